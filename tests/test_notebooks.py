"""Every notebook runs from top to bottom, and keeps what it is read for."""

import os
import re
import resource
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = (
    "quick_start",
    "train_short_test_long",
    "low_rank_biases",
    "sparse_attention",
    "sinks_and_distances",
    "mean_flow",
    "pair_bias_block",
    "digits_vision_transformer",
)
SECONDS = 120  # of one core that counts as fast as COUNTED says
COUNTED = 0.4  # seconds of `seconds_to_count`, where SECONDS was set
BYTES = 400 * 1024
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")

every_notebook = pytest.mark.parametrize("name", NAMES)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def pictures(notebook):
    return sum("image/png" in output.get("data", ()) for output in outputs(notebook))


def words(notebook):
    """What was printed, cell by cell; numbers of a training differ by machine."""
    printed = [
        "".join(
            output.get("text") or output.get("data", {}).get("text/plain", "")
            for output in cell.get("outputs", ())
            if "image/png" not in output.get("data", ())
        )
        for cell in notebook.cells
    ]
    return [NUMBER.sub("0", text).split() for text in printed]


def seconds_of_children():
    """Processor time of the kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_to_count():
    """Processor time of a fixed loop: how slow this machine is just now."""
    start = time.process_time()
    sum(i * i % 7 for i in range(5_000_000))
    return time.process_time() - start


def test_there_are_no_others():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@every_notebook
def test_notebook_is_kept_as_it_is_read(name):
    notebook = read(name)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < BYTES
    assert pictures(notebook) >= 3
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    headings = re.findall(r"^#+ +(.*)$", "\n".join(text), re.MULTILINE)
    assert headings[-1] == "What to use when"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run once, from top to bottom"


@pytest.mark.whole
@every_notebook
def test_notebook_runs(name, tmp_path):
    """In a kernel of this Python, on the CPU; it prints the words that it keeps.

    What a notebook claims of a training it prints as words ("True", "as good").
    """
    kept, notebook = read(name), read(name)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=600, resources=resources)
    slow, start = seconds_to_count(), seconds_of_children()
    # not with what makes tests compile fast: it makes programs run slowly
    plain = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    client.execute(env={**plain, "JAX_PLATFORMS": "cpu"})
    seconds = seconds_of_children() - start
    assert not [o for o in outputs(notebook) if o.get("name") == "stderr"], "warnings"
    assert pictures(notebook) == pictures(kept)
    assert words(notebook) == words(kept)
    slow = max(COUNTED, slow, seconds_to_count()) / COUNTED
    assert 0 < seconds < SECONDS * slow
