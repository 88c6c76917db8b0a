"""Reads callgrind's output files, written with --compress-strings=no --compress-pos=no."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

Function = tuple[str, str]  # object file, name
TRIGGER = "desc: Trigger: Client Request: "


@dataclass
class Profile:
    """Instructions: within a function itself, and with all that it calls. A recursive call is not counted again."""

    title: str = ""
    total: int = 0
    itself: Counter[Function] = field(default_factory=Counter)
    inclusive: Counter[Function] = field(default_factory=Counter)
    calls: Counter[tuple[Function, Function]] = field(default_factory=Counter)  # caller, callee
    called: Counter[tuple[Function, Function]] = field(default_factory=Counter)  # instructions of those calls

    def minus(self, other: Profile) -> Profile:
        return Profile(
            self.title,
            self.total - other.total,
            _difference(self.itself, other.itself),
            _difference(self.inclusive, other.inclusive),
            _difference(self.calls, other.calls),
            _difference(self.called, other.called),
        )


def _difference(a: Counter, b: Counter) -> Counter:  # type: ignore[type-arg]
    result = Counter(a)
    result.subtract(b)
    return Counter({key: value for key, value in result.items() if value})


def read(path: Path) -> Profile:
    profile = Profile()
    here, there = ("", ""), ("", "")
    callee_object: str | None = None
    pending = 0
    with path.open(errors="replace") as lines:
        for line in map(str.rstrip, lines):
            if line.startswith("ob="):
                here = (line[3:], here[1])
            elif line.startswith("fn="):
                here = (here[0], line[3:])
            elif line.startswith("cob="):
                callee_object = line[4:]
            elif line.startswith("cfn="):
                there = (here[0] if callee_object is None else callee_object, line[4:])
                callee_object = None
            elif line.startswith("calls="):
                pending = int(line[6:].split()[0])
            elif line[:1].isdigit():
                cost = int(line.split()[1])
                if not pending:
                    profile.itself[here] += cost
                    profile.inclusive[here] += cost
                    profile.total += cost
                    continue
                profile.calls[here, there] += pending
                profile.called[here, there] += cost
                pending = 0
                if here != there:
                    profile.inclusive[here] += cost
            elif line.startswith(TRIGGER):
                profile.title = line[len(TRIGGER) :]
    return profile


def read_all(folder: Path, stem: str) -> dict[str, Profile]:
    """By title: the dumps that a program asked for."""
    profiles = [read(path) for path in folder.glob(f"{stem}.*")]
    return {profile.title: profile for profile in profiles if profile.title}
