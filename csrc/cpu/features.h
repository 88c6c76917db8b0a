/* features.h: what this processor, and the operating system under it, can run. */
#ifndef FUSEDNORM_FEATURES_H
#define FUSEDNORM_FEATURES_H

#include "../fusednorm.h"

bool fn_cpu_supports(fn_path path);

/* Bytes of the last-level cache; a plausible 32 MiB where the system does not say. */
int64_t fn_last_level_cache_bytes(void);

#endif
