"""docs/losses.md has every name that there is to choose, and its table is that of the registry."""

from __future__ import annotations

import pytest

from srpo_kernels.losses.options import DISTILLATION_MODES, KL_TYPES, REDUCTIONS, TOPK_OF
from srpo_kernels.losses.rows import STUDENT, TEACHER
from srpo_kernels.rows.contract import DIVERGENCES
from tools.losses import DOCUMENT, MARKER, policy_losses

TEXT = DOCUMENT.read_text()


def test_the_table_is_that_of_the_registry() -> None:
    written = TEXT.split(f"<!-- {MARKER} -->")[1].split(f"<!-- /{MARKER} -->")[0]
    assert written.strip() == policy_losses().strip(), "python -m tools.losses writes it again"


@pytest.mark.parametrize(
    "name", [*KL_TYPES, *REDUCTIONS, *DIVERGENCES, *DISTILLATION_MODES, *TOPK_OF, *STUDENT, *TEACHER]
)
def test_every_name_is_there(name: str) -> None:
    assert f"`{name}`" in TEXT or f'"{name}"' in TEXT
