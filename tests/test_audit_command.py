"""`python -m fusednorm`: help, info, and the audit's options, output and behaviour without optional packages."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest

import fusednorm
from fusednorm.audit.peers import BASE

FUSED = "fused_add_rmsnorm"


def command(*arguments: str, before: str = "", code: int = 0) -> tuple[str, str]:
    """stdout and stderr of `python -m fusednorm ARGUMENTS` in a process that runs `before` first."""
    done = helpers.run_python(
        f"import sys\n{before}\nsys.argv = ['fusednorm', *{list(arguments)!r}]\n"
        "import runpy\nrunpy.run_module('fusednorm', run_name='__main__')",
        timeout=300,
    )
    assert done.returncode == code, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def without(*packages: str) -> str:
    """Code that makes packages look as if they were not installed."""
    return (
        f"class Blocker:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {packages!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())"
    )


SMALL = ("--quick", "--rows", "16", "--columns", "64", "--threads", "1", "--device", "cpu")


def test_help() -> None:
    text, _ = command("--help")
    assert "audit" in text
    assert "info" in text
    assert command()[0] == text
    text, _ = command("audit", "--help")
    assert "examples:" in text
    for option in (
        "--rows",
        "--columns",
        "--dtype",
        "--peers",
        "--quick",
        "--plot",
        "--json",
        "--list",
        "--seed",
        "--device",
        "--peer FILE",
    ):
        assert option in text


def test_info() -> None:
    told, known = json.loads(command("info")[0]), fusednorm.info()
    assert told["version"] == known["version"] == fusednorm.__version__
    assert told["cpu"]["available"] == known["cpu"]["available"]
    assert set(told) == set(known)


def test_json(tmp_path: Path) -> None:
    target = tmp_path / "audit.json"
    arguments = ("audit", *SMALL, "--seed", "11", "--dtype", "fp16,fp32", "--peers", "fusednorm,numpy")
    told = json.loads(command(*arguments, "--json", "-")[0])
    text, errors = command(*arguments, "--json", str(target))
    assert "fusednorm hf_llama" in text
    assert str(target) in errors
    again = json.loads(target.read_text())
    assert (told["schema"], told["seed"], told["quick"]) == (3, 11, True)
    assert told["fusednorm"]["version"] == fusednorm.__version__
    assert {peer["package"] for peer in told["peers"]} == {"fusednorm", "numpy"}
    assert all(
        set(peer) == {"name", "label", "package", "version", "device", "operations", "declares", "absent"}
        for peer in told["peers"]
    )
    declares = {peer["name"]: peer["declares"] for peer in told["peers"]}
    assert declares[BASE] == {FUSED: ["s", "y"], "rms_norm": ["y"]}
    assert told["devices"] == {}
    assert [(table["dtype"], table["n"], table["k"]) for table in told["products"]] == [
        ("float16", 256, 1024),
        ("float32", 256, 1024),
    ]
    assert len(told["tables"]) == 8
    for table, same in zip(told["tables"], again["tables"], strict=True):
        assert set(table) == {"device", "data", "operation", "dtype", "rows", "columns", "elements", "results"}
        assert table["device"] == "cpu"
        assert table["elements"] == table["rows"] * table["columns"]
        fused = table["operation"] == FUSED
        keys = {"exact_fp32_sum", "exact_rounded_sum"} if fused else {"exact"}
        assert len(table["results"]) == len(same["results"]) >= 7
        for result, same_result in zip(table["results"], same["results"], strict=True):
            if (result["peer"], table["data"], table["dtype"]) == ("fusednorm:gemma", "hidden states", "float32"):
                assert "does not survive" in result["skipped"]
                continue
            assert result["skipped"] is None
            assert set(result["differ"]) == set(result["largest_ulp"]) == keys | {"exact_nearest_points"}
            assert all(0 <= count <= table["elements"] for count in result["differ"].values())
            assert set(result["batch"]) == {"sizes", "largest", "row_0_changes_at", "any_row_changes_at"}
            assert result["seconds"] > 0
            assert result["untimed"] is None
            assert result["fp32_weight"] is None
            assert result["rounds_as_declared"] in ((None,) if table["dtype"] == "float32" else (True,))
            assert (result["peer"] == BASE) <= (result["relative_time"] == 1.0)
            assert result["differ"] == same_result["differ"]  # the seed decides
    table = told["tables"][0]
    assert (table["data"], table["operation"], table["dtype"]) == ("random", FUSED, "float16")
    counts = {result["peer"]: result["differ"] for result in table["results"]}
    assert counts[BASE]["exact_rounded_sum"] < 10
    assert counts[BASE]["exact_fp32_sum"] > 50  # of 1024: the sum's rounding alone


def test_numpy_alone_is_enough() -> None:
    absent = without("torch", "transformers", "ml_dtypes", "matplotlib", "rich", "jax")
    text, _ = command("audit", *SMALL, before=absent)
    assert "float16, random" in text
    assert "float16, hidden states" in text
    assert "bfloat16, " not in text
    assert "bfloat16 needs ml_dtypes: python -m pip install ml_dtypes" in text
    for label in ("HF eager, as in transformers", "torch F.rms_norm", "torch.compile of HF eager"):
        assert f"absent: {label}" in text
    assert "torch is not installed" in text
    assert "transformers is not installed" in text
    listed, _ = command("audit", "--list", "--device", "cpu", before=absent)
    assert [line.split("absent: ")[1] for line in listed.splitlines() if line.startswith("torch:hf ")] == [
        "torch is not installed (rounds: RMSNorm y; fused add + RMSNorm s, y)"
    ]
    _, errors = command("audit", "--plot", "a.png", before=absent, code=2)
    assert "python -m pip install matplotlib" in errors


def test_packages_that_are_not_selected_are_not_imported() -> None:
    after = (
        "import atexit\n"
        "atexit.register(lambda: print('imported:', [n for n in ('torch', 'transformers', 'rich', 'matplotlib') "
        "if n in sys.modules]))"
    )
    assert "imported: []" in command("audit", *SMALL, "--peers", "fusednorm,numpy", before=after)[0]
    assert "imported: []" in command("audit", "--list", "--device", "cpu,cuda", before=after)[0]


def test_a_broken_torch_is_absent(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    text, _ = command(
        "audit", *SMALL, "--peers", "fusednorm:hf_llama,torch:hf", before=f"sys.path.insert(0, {str(tmp_path)!r})"
    )
    assert "absent: HF eager, as in transformers (import torch failed: libtorch.so: cannot open" in " ".join(
        text.split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "fp8"), "'fp8' is not one of fp16"),
        (("--rows", "0"), "'0' is not a whole number of at least 1"),
        (("--columns", "ten"), "'ten' is not a whole number of at least 1"),
        (("--peers", "nothing"), "--peers nothing selects nothing: --list shows the names"),
        (("--plot", "audit.bmp"), "'audit.bmp' must end in .png or .svg"),
        (("--json", "no/such/folder/a.json"), "there is no folder"),
        (("--data", "images"), "'images' is not one of random, hidden"),
    ],
)
def test_wrong_options(arguments: tuple[str, ...], message: str) -> None:
    assert message in command("audit", *arguments, code=2)[1]
