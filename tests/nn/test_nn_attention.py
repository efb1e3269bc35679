"""Attention against a masked [T, T] softmax, forward and backward; the module against its formula."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from steptron import torch_internals
from steptron.config.schema import AttentionConfig
from steptron.errors import RecipeError
from steptron.nn import attention
from steptron.nn.attention import (
    Attention,
    choose_attention,
    full_attention,
    queries_before,
    sliding_attention,
    span_attention,
)
from steptron.nn.block_attention import (
    AllKeys,
    BlockAttention,
    Gradients,
    backward_blocks,
    forward_blocks,
    heads_first,
    plan_blocks,
    plan_rectangles,
    tokens_first,
)
from steptron.nn.packing import Packing
from steptron.nn.rope import rope_frequencies, rope_tables
from torch import Tensor
from torch.nn import attention as implementations
from torch.nn.attention.varlen import varlen_attn

SHAPES = [
    pytest.param(2, 300, 4, 2, 16, id="2x300 4/2 heads"),
    pytest.param(3, 77, 6, 1, 8, id="3x77 6/1 heads"),
    pytest.param(1, 513, 3, 3, 32, id="1x513 3/3 heads"),
]


def visible(packing: Packing, window: int | None) -> Tensor:
    """[N, N]: a query sees keys of its document (and row), not later, less than `window` back."""
    place = torch.arange(packing.cu_seqlens[-1])
    document = torch.bucketize(place, packing.cu_seqlens_S, right=True)
    distance = place[:, None] - place
    seen = (document[:, None] == document) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def all_scores(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """[H, N, M], −inf where hidden."""
    scores = torch.einsum("nha,mha->hnm", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf)


def naive(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """All scores at once."""
    v = v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("hnm,mha->nha", all_scores(q, k, seen).softmax(-1), v)


def kernel(q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None) -> Tensor:
    return full_attention(q, k, v, packing) if window is None else sliding_attention(q, k, v, packing, window)


def random_qkv(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(tokens, h, width, dtype=dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (got.double() - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), error


@pytest.mark.parametrize("window", [None, 1, 2, 7, 32, 100, 1000], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("documents", ["one", "few", "tiny"])
@pytest.mark.parametrize(("rows", "tokens", "heads", "kv_heads", "width"), SHAPES)
def test_kernels_equal_masked_softmax(make_packing, rows, tokens, heads, kv_heads, width, documents, window):
    packing = make_packing(rows, tokens, documents)
    inputs = random_qkv(rows * tokens, heads, kv_heads, width, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = kernel(*inputs, packing, window)
    expected = naive(*exact, visible(packing, window))
    grad = torch.randn_like(out)
    assert_close(out, expected, 1e-5)
    grads, exact_grads = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, exact, grad.double())
    for got, wanted in zip(grads, exact_grads, strict=True):
        assert_close(got, wanted, 1e-5)


@pytest.mark.parametrize("window", [None, 32], ids=["full", "sliding"])
def test_bf16_is_as_close_as_its_rounding(make_packing, window):
    packing = make_packing(2, 200, "few")
    inputs = random_qkv(400, 4, 2, 32, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = kernel(*inputs, packing, window), naive(*exact, visible(packing, window))
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, 2**-8)
    grad = torch.randn_like(out)
    grads, exact_grads = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, exact, grad.double())
    for got, wanted in zip(grads, exact_grads, strict=True):
        assert_close(got, wanted, 2**-7)


@pytest.mark.parametrize("window", [None, 2], ids=["full", "sliding"])
def test_gradients_by_finite_differences(make_packing, window):
    packing = make_packing(2, 8, "few")
    blocks = plan_blocks(
        ((0, packing.cu_seqlens[-1], 0),), packing.cu_seqlens, window, 6, torch.float64, torch.device("cpu")
    )
    inputs = random_qkv(16, 2, 1, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *qkv: BlockAttention.apply(*qkv, blocks), inputs)


@pytest.mark.parametrize("window", [None, 48], ids=["full", "sliding"])
def test_bitwise_the_same_every_time(make_packing, window):
    packing = make_packing(2, 300, "few")

    def run() -> list[Tensor]:
        inputs = random_qkv(600, 4, 2, 32, torch.float32)
        out = kernel(*inputs, packing, window)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def scores_of(packing: Packing, window: int | None, size: int) -> int:
    blocks = plan_blocks(
        ((0, packing.cu_seqlens[-1], 0),), packing.cu_seqlens, window, size, torch.float32, torch.device("cpu")
    )
    assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
    return sum((b.stop - b.start) * (b.stop - b.first_key) for b in blocks)


@pytest.mark.parametrize("documents", ["one", "few", "tiny"])
def test_sliding_work_grows_with_tokens_times_window(make_packing, documents):
    packing = make_packing(2, 2048, documents)
    assert scores_of(packing, 128, 64) <= 2 * 2048 * (128 + 64)


@pytest.mark.parametrize("window", [1, 4, 16, 64, 65, 100, 128, 512])
def test_a_small_window_is_not_cut_into_small_blocks(window):
    """Blocks of 16 queries took three to four times the time of blocks of 64, at windows of 2 to 32."""
    size = attention.block_size(2, 8192, window)
    assert size % 16 == 0
    assert 64 <= size <= 128
    assert size >= min(window, 128)


def test_full_work_is_the_triangle_of_each_document():
    packing = Packing.from_documents(torch.arange(8).repeat_interleave(512).view(1, -1))
    assert scores_of(packing, None, 128) == 8 * 512 * (512 + 128) // 2


def test_shapes_of_products_do_not_follow_the_documents(make_packing):
    shapes = set()
    for tokens in range(900, 1000, 7):
        documents = torch.zeros(1, 1024, dtype=torch.long)
        documents[:, tokens:] = 1
        cu_seqlens = Packing.from_documents(documents).cu_seqlens
        blocks = plan_blocks(((0, 1024, 0),), cu_seqlens, None, 128, torch.float32, torch.device("cpu"))
        shapes |= {(b.stop - b.start, b.stop - b.first_key) for b in blocks}
    assert len(shapes) <= 1024 // 128


SPANS, BORDERS = ((0, 40, 31), (40, 41, 90), (41, 300, 141)), (0, 7, 50, 71, 91, 150, 160, 290, 400)


def seen_by_spans(window: int | None) -> Tensor:
    """[N, M] of SPANS and BORDERS."""
    packing = Packing.from_documents(torch.bucketize(torch.arange(400), torch.tensor(BORDERS[1:-1]), right=True)[None])
    places = torch.cat([torch.arange(key, key + stop - start) for start, stop, key in SPANS])
    return visible(packing, window)[places]


@pytest.mark.parametrize("window", [None, 1, 20, 150], ids=lambda w: f"window {w}")
def test_spans_of_a_longer_buffer_of_keys(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, h, 8, dtype=torch.float64).requires_grad_() for n, h in ((300, 4), (400, 2), (400, 2)))
    out, expected = span_attention(q, k, v, SPANS, BORDERS, window), naive(q, k, v, seen_by_spans(window))
    assert_close(out, expected, 1e-12)
    grad = torch.randn_like(out)
    grads, exact_grads = (torch.autograd.grad(o, (q, k, v), grad) for o in (out, expected))
    for got, wanted in zip(grads, exact_grads, strict=True):
        assert_close(got, wanted, 1e-12)


def test_spans_as_a_variable_length_call(monkeypatch):
    """What a GPU's kernel is handed, with the kernel written out: the i-th queries see the i-th keys, ends aligned."""

    def by_hand(q, k, v, cu_queries, cu_keys, longest_queries, longest_keys, **options):
        inspect.signature(varlen_attn).bind(q, k, v, cu_queries, cu_keys, longest_queries, longest_keys, **options)
        assert cu_queries.dtype == cu_keys.dtype == torch.int32
        assert (longest_queries, longest_keys) == (cu_queries.diff().max(), cu_keys.diff().max())
        before, after = options["window_size"]
        seen = torch.zeros(len(q), len(k), dtype=torch.bool)
        for i in range(len(cu_keys) - 1):
            queries, keys = slice(*cu_queries[i : i + 2].tolist()), slice(*cu_keys[i : i + 2].tolist())
            part = seen[queries, keys]
            offset = part.shape[1] - part.shape[0]
            part[:] = torch.ones_like(part).tril(offset + after).triu(offset - before)
        return naive(q, k, v, seen)

    monkeypatch.setattr(attention, "use_flash", lambda q: True)
    monkeypatch.setattr(torch_internals, "varlen_attn", by_hand)
    q, k, v = torch.randn(300, 4, 8), *torch.randn(2, 400, 2, 8)
    assert_close(span_attention(q, k, v, SPANS, BORDERS, 20), naive(q, k, v, seen_by_spans(20)).double(), 1e-5)


def test_queries_before_a_border():
    places = [p for start, stop, key in SPANS for p in range(key, key + stop - start)]
    assert queries_before(SPANS, BORDERS) == tuple(sum(p < border for p in places) for border in BORDERS)


@pytest.mark.parametrize("causal_first", [True, False], ids=["after own keys", "alone"])
@pytest.mark.parametrize("size", [16, 128])
def test_rectangles_merge_by_log_sum_exp(size, causal_first):
    """Causal attention of two documents, then keys from elsewhere in two parts; alone, most queries see nothing."""
    torch.manual_seed(0)
    inputs = [torch.randn(n, h, 8, dtype=torch.float64) for n, h in ((200, 4), (250, 2), (250, 2))]
    borders, rectangles = (0, 90, 200, 250), ((0, 37, 203, 241), (90, 150, 55, 83), (90, 101, 220, 250))
    seen = torch.zeros(200, 250, dtype=torch.bool)
    blocks = plan_rectangles(rectangles, 200, size)
    if causal_first:
        seen[:, :200] = visible(Packing.from_documents((torch.arange(200) >= 90)[None].long()), None)
        own = plan_blocks(((0, 200, 0),), borders, None, size, torch.float64, torch.device("cpu"))
        blocks = own + blocks
    for start, stop, first_key, stop_key in rectangles:
        seen[start:stop, first_key:stop_key] = True
    q, k, v = (heads_first(x, 2) for x in inputs)
    o, lse = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    forward_blocks(q, k, v, blocks, 2, o, lse)

    exact = [x.clone().requires_grad_() for x in inputs]
    some = seen.any(1)
    expected = naive(exact[0][some], *exact[1:], seen[some])
    assert_close(tokens_first(o, 200)[some], expected, 1e-12)
    assert torch.equal(tokens_first(o, 200)[~some], torch.zeros(int((~some).sum()), 4, 8, dtype=torch.float64))
    lse_NH = tokens_first(lse.unsqueeze(-1), 200).squeeze(-1)
    exact_lse_NH = all_scores(*inputs[:2], seen).logsumexp(-1).T
    assert torch.equal(lse_NH.isinf(), ~some[:, None].expand(-1, 4))
    assert_close(lse_NH[some], exact_lse_NH[some], 1e-12)

    grad_NHA = torch.randn(200, 4, 8, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, exact, grad_NHA[some])
    grad_o = heads_first(grad_NHA, 2)
    grads = Gradients(q_KPA=torch.zeros_like(q), k_KAM=torch.zeros_like(k.mT), v_KAM=torch.zeros_like(v.mT))
    backward_blocks(q, k, v, grad_o, blocks, 2, grads, AllKeys(lse_KP=lse, delta_KP=(grad_o * o).sum(-1)))
    assert_close(tokens_first(grads.q_KPA, 200) / 8**0.5, wanted[0], 1e-12)
    assert_close(grads.k_KAM.permute(2, 0, 1) / 8**0.5, wanted[1], 1e-12)
    assert_close(grads.v_KAM.permute(2, 0, 1), wanted[2], 1e-12)


def test_a_rank_with_pieces_of_rows_is_not_taken_for_the_whole():
    packing = Packing.from_documents(torch.zeros(1, 8, dtype=torch.long), ((0, 2), (6, 8)))
    with pytest.raises(AssertionError, match="pieces of rows"):
        full_attention(*random_qkv(4, 2, 1, 4, torch.float32), packing)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 32], ids=["full", "sliding"])
def test_cuda_equals_masked_softmax(make_packing, window):
    packing = make_packing(2, 200, "few")
    inputs = random_qkv(400, 4, 2, 64, torch.bfloat16)
    expected = naive(*(x.detach().double() for x in inputs), visible(packing, window))
    out = kernel(*(x.detach().cuda() for x in inputs), packing.to("cuda"), window)
    assert_close(out.cpu(), expected, 2**-7)


def small_module(window: int | None) -> tuple[Attention, Tensor, tuple[Tensor, Tensor], Packing]:
    torch.manual_seed(0)
    config = AttentionConfig(num_heads=4, num_kv_heads=2, rotary_share=0.5, window=window)
    module = Attention(24, 8, config, 1e-5)
    for norm in (module.q_norm, module.k_norm):
        torch.nn.init.normal_(norm.weight, std=0.3)
    packing = Packing.from_documents(torch.tensor([[0] * 30 + [1] * 10, [1] * 40]))
    rope = rope_tables(packing.positions_BT.flatten(), rope_frequencies(8, 0.5, 1e4, None))
    return module, torch.randn(2, 40, 24), rope, packing


@pytest.mark.parametrize("window", [None, 9], ids=["full", "sliding"])
def test_module_equals_its_formula(window):
    module, x, rope, packing = small_module(window)
    w = {name: p.detach().double() for name, p in module.named_parameters()}
    cos, sin = (t.double()[:, None] for t in rope)
    flat = x.double().flatten(0, 1)

    def project(name: str) -> Tensor:
        return (flat @ w[f"{name}.weight"].T).view(80, -1, 8)

    def norm_and_turn(x: Tensor, weight: Tensor) -> Tensor:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight)
        plane = torch.complex(x[..., :2], x[..., 2:4]) * torch.complex(cos, sin)
        return torch.cat([plane.real, plane.imag, x[..., 4:]], -1)

    q = norm_and_turn(project("q_proj"), w["q_norm.weight"])
    k = norm_and_turn(project("k_proj"), w["k_norm.weight"])
    o = naive(q, k, project("v_proj"), visible(packing, window))
    o = o * torch.sigmoid(flat @ w["gate_proj.weight"].T)[..., None]
    assert_close(module(x, packing, rope), (o.flatten(1) @ w["o_proj.weight"].T).view(2, 40, 24), 1e-5)


def test_kernel_can_be_replaced_from_outside():
    module, x, rope, packing = small_module(None)
    module.kernel = lambda q, k, v, packing: torch.zeros_like(q)
    assert torch.equal(module(x, packing, rope), torch.zeros_like(x))


def test_module_needs_no_memory_on_meta():
    with torch.device("meta"):
        module = Attention(4096, 128, AttentionConfig(num_heads=96, num_kv_heads=8, window=512), 1e-5)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "q_proj.weight": (12288, 4096),
        "k_proj.weight": (1024, 4096),
        "v_proj.weight": (1024, 4096),
        "o_proj.weight": (4096, 12288),
        "gate_proj.weight": (96, 4096),
        "q_norm.weight": (128,),
        "k_norm.weight": (128,),
    }


CUDA, KINDS = (
    torch.device("cuda"),
    [AttentionConfig(num_heads=8, num_kv_heads=2, window=window) for window in (None, 4)],
)


@pytest.mark.parametrize(
    ("name", "reason"), [("fa3", "No module named 'flash_attn_interface'"), ("fa4", "No module named 'flash_attn'")]
)
def test_a_flash_attention_that_torch_does_not_have_is_refused_and_not_left_active(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RecipeError, match=rf"^kernels\.attention={name} cannot run here: {reason}; choose auto"
    ) as caught:
        choose_attention(name, CUDA, "bf16", 64, KINDS)  # pyright: ignore[reportArgumentType]
    assert caught.value.exit_code == 2
    assert implementations.current_flash_attention_impl() is None


def test_a_flash_attention_is_active_until_another_is_chosen_and_tried_on_each_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a package in its place that torch's registry takes."""
    package = ModuleType("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    for name in ("fwd", "bwd"):
        monkeypatch.setattr(torch.ops.flash_attn_3, name, None, raising=False)
    tried: list[int | None] = []
    monkeypatch.setattr(attention, "_try_flash", lambda kind, head_dim, device: tried.append(kind.window))
    choose_attention("fa3", CUDA, "bf16", 64, KINDS)
    assert (implementations.current_flash_attention_impl(), tried) == ("FA3", [None, 4])
    choose_attention("fa2", CUDA, "bf16", 64, KINDS)
    assert (implementations.current_flash_attention_impl(), tried) == (None, [None, 4, None, 4])

    def fails(*_: object) -> None:
        raise AssertionError("Deterministic backward not supported for hdim 256.\nmore")

    monkeypatch.setattr(attention, "_try_flash", fails)
    with pytest.raises(RecipeError, match=r"fa3 cannot run here: Deterministic .* hdim 256\.; choose auto"):
        choose_attention("fa3", CUDA, "bf16", 256, KINDS)
    assert implementations.current_flash_attention_impl() is None
