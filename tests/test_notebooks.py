"""Every committed notebook runs from top to bottom without a screen, and carries nothing but its source."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(REPO.glob("notebooks/*.ipynb"))


def _code(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS][:2] == ["00_explore", "01_your_own"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_stripped(path):
    notebook = json.loads(path.read_text())
    assert "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_explore_defines_nothing_and_shows_every_panel():
    code = _code(REPO / "notebooks/00_explore.ipynb")
    assert not any(line.lstrip().startswith(("def ", "class ", "@")) for cell in code for line in cell.splitlines())
    for panel in ("page_settings(", "page_allocation(", "decode_stepper(trace", "memory_layout(cache"):
        assert any(cell.startswith(panel) for cell in code), f"{panel}...) is a cell of its own"


def test_your_own_is_short():
    lines = [line for cell in _code(REPO / "notebooks/01_your_own.ipynb") for line in cell.splitlines() if line.strip()]
    assert len(lines) < 40


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")])))
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))  # as in browser_lab
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=540, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    panels = sum("pqlab-panel" in state["state"].get("_dom_classes", []) for state in _widgets(notebook))
    assert panels == {"00_explore": 4, "01_your_own": 1}.get(path.stem, panels), f"{len(shown)} widgets were shown"
    told = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert not any("Error" in text or "Traceback" in text for text in told), told


def _widgets(notebook) -> list[dict]:
    kept = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    return list(kept.get("state", {}).values())
