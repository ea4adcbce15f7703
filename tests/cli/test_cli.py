"""The command line as users meet it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fusekit
from fusekit.methods import available
from tests.engine.support import random_models, write_model

SHAPES = {"model.layers.0.w": (40, 30), "model.layers.1.w": (40, 30), "norm": (30,)}


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fusekit", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A TIES recipe beside its models."""
    base, models = random_models(SHAPES, 2)
    for name, tensors in {"base": base, "a": models[0], "b": models[1]}.items():
        write_model(tmp_path / name, tensors, {"model_type": "toy"})
    path = tmp_path / "recipe.yml"
    path.write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {density: 0.4}\n"
    )
    return path


# -- merge ----------------------------------------------------------------------------------------


def test_merge_writes_a_folder_and_says_what_it_did(recipe: Path) -> None:
    out = recipe.parent / "out"
    done = run("merge", recipe, out, "--threads", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{out}: 3 tensors"
    assert "peak memory" in done.stdout
    assert fusekit.verify(out).ok


def test_a_dry_run_prints_the_plan_and_writes_nothing(recipe: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    done = run("merge", recipe, recipe.parent / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("plan", recipe).stdout
    assert "ties" in done.stdout
    assert sorted(recipe.parent.rglob("*")) == before


def test_an_existing_folder_is_replaced_only_when_told_to(recipe: Path) -> None:
    out = recipe.parent / "out"
    fusekit.merge(recipe, out)
    (out / "precious").touch()
    refused = run("merge", recipe, out)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert (out / "precious").exists()
    done = run("merge", recipe, out, "--overwrite", "--no-resume", "--out-shard-size", "5kB")
    assert done.returncode == 0, done.stderr
    assert not (out / "precious").exists()
    assert len(list(out.glob("*.safetensors"))) > 1


def test_nonfinite_values_need_to_be_allowed_and_are_warned_of(recipe: Path) -> None:
    _, models = random_models(SHAPES, 2)
    models[0]["norm"][:3] = np.nan
    write_model(recipe.parent / "a", models[0])
    refused = run("merge", recipe, recipe.parent / "out")
    assert refused.returncode == 2
    assert "--allow-nonfinite" in refused.stderr
    allowed = run("merge", recipe, recipe.parent / "out", "--allow-nonfinite")
    assert allowed.returncode == 0
    assert "warning: a: tensor 'norm' has 3 NaN or infinite values" in allowed.stderr


def test_values_beyond_the_output_type_are_warned_of(tmp_path: Path) -> None:
    write_model(tmp_path / "m", {"w": np.array([1e6, 1.0], np.float32)})
    recipe = tmp_path / "r.yml"
    recipe.write_text("merge_method: passthrough\nmodels: [{model: m}]\nout_dtype: float16\n")
    done = run("merge", recipe, tmp_path / "out")
    assert done.returncode == 0
    assert "tensor 'w': 1 merged values are beyond the range" in done.stderr


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "misspelt parameter": (
        lambda r: r.write_text(r.read_text().replace("density", "densty")),
        "did you mean 'density'?",
    ),
    "not YAML": (lambda r: r.write_text("a: ["), "not valid YAML"),
    "no model": (lambda r: (r.parent / "b/model.safetensors").unlink(), "no weights found"),
    "not a checkpoint": (
        lambda r: (r.parent / "b/model.safetensors").write_bytes(b"hello world"),
        "not a safetensors file",
    ),
    "other shape": (
        lambda r: write_model(r.parent / "b", {**random_models(SHAPES, 0)[0], "norm": np.zeros(3)}),
        "has shape [3], expected [30]",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_on_stderr_and_status_2(
    recipe: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(recipe)
    before = sorted(recipe.parent.rglob("*"))
    done = run("merge", recipe, recipe.parent / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("fusekit: ")
    assert message in line
    assert sorted(recipe.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "recipe.yml"],
        ["merge", "recipe.yml", "out", "--threads", "0"],
        ["merge", "recipe.yml", "out", "--out-shard-size", "big"],
        ["frobnicate"],
    ],
)
def test_wrong_arguments_are_status_2(recipe: Path, arguments: list[str]) -> None:
    done = run(*arguments, cwd=recipe.parent)
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert not (recipe.parent / "out").exists()


def test_an_interrupted_merge_says_how_to_continue_and_does(recipe: Path) -> None:
    out = recipe.parent / "out"
    recipe.write_text(recipe.read_text() + "seed: 1\n")
    interrupting = (
        "import os, signal, sys, fusekit.cli, fusekit.engine.run as run\n"
        "run._execute = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.argv = ['fusekit', 'merge', {str(recipe)!r}, {str(out)!r}]\n"
        "fusekit.cli.main()\n"
    )
    stopped = subprocess.run(
        [sys.executable, "-c", interrupting], capture_output=True, text=True, check=False
    )
    assert stopped.returncode == 130
    assert stopped.stderr == "fusekit: interrupted; run the same command again to continue\n"
    assert not out.exists()
    assert run("merge", recipe, out).returncode == 0


def test_a_merge_needs_no_standard_streams(recipe: Path) -> None:
    out = recipe.parent / "out"
    command = [sys.executable, "-m", "fusekit", "merge", str(recipe), str(out)]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=False)
    assert done.returncode == 0
    assert fusekit.verify(out).ok


def test_output_that_cannot_be_printed_is_one_sentence(recipe: Path) -> None:
    command = [sys.executable, "-m", "fusekit", "plan", str(recipe)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "fusekit: No space left on device\n"


def test_a_reader_that_goes_away_is_no_error_to_speak_of() -> None:
    command = f"{sys.executable} -m fusekit methods | true"
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["sh", "-c", command], env=buffered, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


# -- plan, methods, verify ------------------------------------------------------------------------


def test_plan_lists_inputs_sizes_and_tensors(recipe: Path) -> None:
    done = run("plan", recipe, "--tensors")
    assert done.returncode == 0, done.stderr
    for word in ("base", "3 merged", "3 float32", "model.layers.1.w", "40x30", "density"):
        assert word in done.stdout


def test_methods_lists_every_method() -> None:
    done = run("methods")
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert listed == list(available())


def test_a_method_is_explained_with_its_parameters_and_references() -> None:
    done = run("methods", "ties")
    assert done.returncode == 0
    method = available()["ties"]
    for parameter in method.parameters:
        assert f"  {parameter.name}  ({parameter.describe_range()}; " in done.stdout
    assert method.references[0].split(",")[0] in done.stdout


def test_an_unknown_method_names_the_nearest() -> None:
    done = run("methods", "tiess")
    assert done.returncode == 2
    assert done.stderr == "fusekit: unknown merge_method 'tiess' (did you mean 'ties'?)\n"


def test_verify_says_yes_or_names_what_differs(recipe: Path) -> None:
    out = recipe.parent / "out"
    fusekit.merge(recipe, out)
    good = run("verify", out)
    assert good.returncode == 0
    assert "3 tensors" in good.stdout
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    bad = run("verify", out)
    assert bad.returncode == 1
    (line,) = bad.stderr.splitlines()
    assert "norm: the bytes differ from those that were written" in line


def test_verify_of_a_folder_without_a_manifest_is_status_2(tmp_path: Path) -> None:
    done = run("verify", tmp_path)
    assert done.returncode == 2
    assert str(tmp_path / "manifest.json") in done.stderr


# -- start-up -------------------------------------------------------------------------------------

HEAVY = ("numpy", "numba", "torch", "transformers", "peft", "tokenizers", "ml_dtypes")

PROBE = """
import sys
sys.argv[1:] = {arguments}
try:
    from fusekit.cli import main
    main()
except SystemExit:
    pass
print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["methods", "ties"]])
def test_help_and_methods_import_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(arguments=arguments, heavy=HEAVY)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout
    assert done.stderr == "[]\n"


def test_importing_fusekit_imports_nothing_heavy() -> None:
    code = f"import fusekit, sys; print([n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == f"fusekit {fusekit.__version__}\n"
