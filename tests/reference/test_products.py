"""Every product of settings trains as the plain program does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from products import SPACE, Case, described, verdict

CASES = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SPACE.items()})


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(CASES)
def test_training_equals_the_plain_program(case: Case) -> None:
    assert not verdict(case), described(case)


@pytest.mark.slow
def test_training_equals_the_plain_program_in_a_thousand_cases() -> None:
    script = Path(__file__).with_name("products.py")
    done = subprocess.run([sys.executable, script, "--cases", "1000", "--seed", "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
