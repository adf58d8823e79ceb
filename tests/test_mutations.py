"""The table of planted faults fits the code."""

import pytest

from pallas_attn.testing.mutations import FAULTS, planted, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_a_fault_can_be_planted(fault):
    text = (ROOT / "pallas_attn" / fault.path).read_text()
    compile(planted(fault, text), fault.path, "exec")
    for name in fault.tests.split():
        assert (ROOT / "tests" / f"test_{name}.py").exists()
