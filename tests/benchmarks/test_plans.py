"""The table of full-size plans: what the docs show is what the script prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plans import CONFIGS, markdown, model_of, plans

PAGE = Path(__file__).parents[2] / "docs" / "plans.md"


def test_the_page_is_what_the_script_prints() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(plans()) + "\n"


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    # Parameters as the checkpoints' pages say; KV bytes of a token and layer in float16.
    [("LLaVA-1.5-7B", 7.06, 16384), ("LLaVA-1.5-13B", 13.35, 20480), ("Qwen2.5-VL-3B", 3.75, 1024),
     ("Qwen2.5-VL-7B", 8.29, 2048)],
)  # fmt: skip
def test_sizes_are_those_of_the_public_models(name: str, billions: float, kv_bytes: int) -> None:
    model = model_of(name)
    assert sum(model.num_parameters.values()) / 1e9 == pytest.approx(billions, abs=0.02)
    assert 2 * model.text.num_kv_heads * model.text.head_dim * 2 == kv_bytes
    assert model.vision.tokens_per_image == 576
    assert name in CONFIGS
