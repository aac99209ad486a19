"""Blocks of small models against those of transformers, with the same weights; rotary tables and norms by hand."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from memwall.models.torch_blocks import attended, described, norm_of, rotary, rotated, scores_of  # noqa: E402
from memwall.models.torch_grouped import Grouped  # noqa: E402
from memwall.models.torch_mla import Latent  # noqa: E402
from memwall.models.torch_moe import Experts  # noqa: E402
from memwall.models.torch_rwkv import Rwkv  # noqa: E402

WIDTH, TOKENS = 16, 11


def causal() -> torch.Tensor:
    return torch.full((1, 1, TOKENS, TOKENS), float("-inf")).triu(1)


def tables(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as transformers wants them, [1, T, D]."""
    cos, sin = (torch.cat([part, part], -1)[None] for part in rotary(torch.arange(TOKENS), size))
    return cos, sin


def copied(ours: Any, theirs: Any, names: dict[str, str]) -> None:
    with torch.no_grad():
        for mine, other in names.items():
            getattr(theirs, other).weight.copy_(getattr(ours, mine).weight)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_attention_is_llamas(kv_heads: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    torch.manual_seed(0)
    ours = Grouped(heads=4, kv_heads=kv_heads, head_dim=8).build(WIDTH)
    config = LlamaConfig(hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=8,
                         attn_implementation="eager")  # fmt: skip
    theirs = LlamaAttention(config, 0).eval()
    copied(ours, theirs, {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        wanted = theirs(x, position_embeddings=tables(8), attention_mask=causal())[0]
        assert torch.allclose(ours(x), wanted, atol=1e-5)


def test_latent_attention_is_deepseeks() -> None:
    module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    torch.manual_seed(0)
    spec = Latent(heads=4, head_dim=8, rank=12, turned_dim=4)
    ours = spec.build(WIDTH)
    config = DeepseekV3Config(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=12,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, rope_interleave=False, attn_implementation="eager",
    )  # fmt: skip
    theirs = module.DeepseekV3Attention(config, 0).eval()
    copied(ours, theirs, {"q_proj": "q_proj", "down_proj": "kv_a_proj_with_mqa", "o_proj": "o_proj"})
    with torch.no_grad():
        up = torch.cat([ours.key_up, ours.value_up], 1)  # [H, 8 + 8, r]
        theirs.kv_b_proj.weight.copy_(up.flatten(0, 1))
        theirs.kv_a_layernorm.variance_epsilon = 1e-5
        x = torch.randn(2, TOKENS, WIDTH)
        wanted = theirs(x, position_embeddings=tables(4), attention_mask=causal())[0]
        assert torch.allclose(ours(x), wanted, atol=1e-5)


def test_experts_are_mixtrals() -> None:
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    torch.manual_seed(0)
    ours = Experts(count=4, top=2, size=6).build(WIDTH).eval()
    config = MixtralConfig(hidden_size=WIDTH, intermediate_size=6, num_local_experts=4, num_experts_per_tok=2)
    theirs = module.MixtralSparseMoeBlock(config).eval()
    if not hasattr(theirs.experts, "gate_up_proj"):
        pytest.skip("this transformers keeps experts apart")
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(ours.gate_up)
        theirs.experts.down_proj.copy_(ours.down)
        x = torch.randn(2, TOKENS, WIDTH)
        made = theirs(x)
        assert torch.allclose(ours(x), made[0] if isinstance(made, tuple) else made, atol=1e-5)


def test_time_mixing_is_rwkvs() -> None:
    module = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")

    torch.manual_seed(0)
    ours = Rwkv(size=8).build(WIDTH)
    k, v = torch.randn(2, 2, 40, 8)
    state = tuple(ours.cache(2, 40).sums)
    with torch.no_grad():
        outs = []
        for start in range(0, 40, 16):
            out, state = ours._chunk(k[:, start : start + 16], v[:, start : start + 16], state)
            outs.append(out)
        wanted, _ = module.rwkv_linear_attention_cpu(ours.log_decay, ours.bonus, k, v)
    assert torch.allclose(torch.cat(outs, 1), wanted, atol=1e-5)


def test_turning_keeps_lengths_and_tells_distances() -> None:
    x = torch.randn(5, 8)
    turned = rotated(x, rotary(torch.arange(5), 8))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    one = x[:1].expand(7, 8)
    places = rotated(one, rotary(torch.arange(7), 8))
    products = scores_of(places, places)
    assert torch.allclose(products[0, 2], products[3, 5], atol=1e-4)
    assert torch.allclose(scores_of(x[:2], x), x[:2] @ x.t(), atol=1e-5)


def test_norm_by_hand_and_specs_as_records_hold_them() -> None:
    assert torch.allclose(norm_of(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / 12.5**0.5, atol=1e-5)
    told = described(Grouped(heads=2, kv_heads=1, head_dim=4))
    assert told == {"kind": "grouped", "heads": 2, "kv_heads": 1, "head_dim": 4, "turned": True, "relative": False}


@pytest.mark.parametrize(("groups", "shared", "dim", "value_dim"), [(4, 1, 32, 32), (1, 4, 32, 32), (2, 3, 20, 13)])
def test_a_token_attends_alike_with_and_without_gradients(groups: int, shared: int, dim: int, value_dim: int) -> None:
    torch.manual_seed(0)
    queries, rows = torch.randn(2, groups, shared, dim), torch.randn(2, groups, 70, dim)
    values = rows[..., :value_dim]
    want = attended(queries.requires_grad_(), rows, values, 0.3)
    with torch.no_grad():
        found = attended(queries, rows, values, 0.3)
    assert want.requires_grad
    assert found.shape == (2, groups, shared, value_dim)
    assert torch.allclose(found, want, atol=1e-5)
