import numpy as np
import pytest

from reroute.runtime.rope import Rotary


@pytest.mark.parametrize(("head_dim", "theta"), [(32, 10000.0), (64, 10000.0), (128, 10000.0), (128, 1e6)])
def test_equals_transformers(head_dim: int, theta: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    module = LlamaRotaryEmbedding(config)
    positions = torch.arange(2500)[None]
    cos, sin = (t[0, :, : head_dim // 2].numpy() for t in module(torch.zeros(1), positions))
    table = Rotary(head_dim=head_dim, theta=theta, rows=2500)
    # torch's float32 power is not rounded correctly everywhere; where inv_freq is equal, all the rest is.
    same = module.inv_freq.numpy() == _inv_freq(head_dim, theta)
    assert same.mean() > 0.95
    np.testing.assert_allclose(table.cos[:, same], cos[:, same], atol=1e-6, rtol=0)
    np.testing.assert_allclose(table.sin[:, same], sin[:, same], atol=1e-6, rtol=0)
    np.testing.assert_allclose(table.cos, cos, atol=2e-4, rtol=0)
    assert table.cos.dtype == np.float32


def _inv_freq(head_dim: int, theta: float) -> np.ndarray:
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / np.power(theta, exponent.astype(np.float64)).astype(np.float32)


def test_rows_are_views_of_their_positions() -> None:
    table = Rotary(head_dim=8, theta=100.0, rows=20)
    cos, sin = table.rows(5, 3)
    assert cos.base is table.cos
    np.testing.assert_allclose(cos[0], np.cos(5 * 100.0 ** (-np.arange(0, 8, 2) / 8)), atol=1e-6)
    np.testing.assert_allclose(sin[2], np.sin(7 * 100.0 ** (-np.arange(0, 8, 2) / 8)), atol=1e-6)


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (18, 3), (21, 0)])
def test_refuses_positions_outside(start: int, count: int) -> None:
    with pytest.raises(ValueError, match="positions"):
        Rotary(head_dim=8, theta=100.0, rows=20).rows(start, count)
