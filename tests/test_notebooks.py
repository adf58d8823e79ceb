"""Every notebook runs from top to bottom, and keeps the pictures it is read for."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook():
    assert "quick_start.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    """In a kernel of this Python, on the CPU, each cell within two minutes."""
    notebook = nbformat.read(path, as_version=4)
    assert "image/png" in str(notebook.cells), "kept outputs hold pictures"
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=120, resources=resources)
    client.execute(env={**os.environ, "JAX_PLATFORMS": "cpu"})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert not [o for o in outputs if o.get("name") == "stderr"], "warnings"
