"""The network once more, as plainly as it can be written: float64, one document, one head, and one token's experts at a
time.

Independent of the package's own maths: it takes a state dict and a configuration and nothing else.
"""

import math

import torch
from steptron.config.schema import ModelConfig, StageConfig


class Naive:
    """Losses of a batch of rows, from the parameters `state` (name → float64 tensor, with gradients)."""

    def __init__(self, config: ModelConfig, stage: StageConfig, state: dict[str, torch.Tensor]):
        self.config, self.stage, self.state = config, stage, state
        self.routed: dict[int, list[tuple[torch.Tensor, list[int]]]] = {}
        """The router's logits, with gradients, and the selected experts of each token, in the order of the tokens, for
        each MoE layer."""
        self.logits: list[torch.Tensor] = []
        """The output matrix's logits [tokens, vocabulary], one tensor per document, in the order of the tokens."""

    def losses(self, tokens_BS, documents_BS, seq_len, weights_BS=None):
        """Sum of the next-token losses times the weights of the tokens predicted (None: all 1), and of each MTP head's,
        over all rows."""
        sums = [torch.zeros((), dtype=torch.float64) for _ in range(1 + self.config.num_mtp_heads)]
        if weights_BS is None:
            weights_BS = [[1.0] * len(tokens) for tokens in tokens_BS]
        for tokens, documents, self.weights in zip(tokens_BS, documents_BS, weights_BS, strict=True):
            start = 0
            while start < seq_len:
                end = start
                while end < seq_len and documents[end] == documents[start]:
                    end += 1
                reach = end
                while reach < len(tokens) and documents[reach] == documents[start]:
                    reach += 1
                self._document(tokens, start, end, reach, sums)
                start = end
        return sums

    def _document(self, tokens, start, end, reach, sums):
        embedding = self.state["embedding.weight"]
        x = embedding[tokens[start:end]]
        for n in range(self.config.num_layers):
            kind = self.config.layer_pattern[n % len(self.config.layer_pattern)]
            x = self._block(x, f"layers.{n}.", kind, None if n < self.config.num_dense_layers else n)
        logits = self._norm(x, "norm.weight") @ self.state["lm_head.weight"].T
        self.logits.append(logits)
        sums[0] = sums[0] + self._cross_entropy(logits, tokens, start, end, reach, 1)
        for h in range(self.config.num_mtp_heads):
            p = f"mtp.{h}."
            ahead = embedding[tokens[start + h + 1 : end + h + 1]]
            both = [self._norm(ahead, p + "embedding_norm.weight"), self._norm(x, p + "hidden_norm.weight")]
            x = torch.cat(both, dim=-1) @ self.state[p + "eh_proj.weight"].T
            x = self._block(x, p + "block.", "S", None)
            logits = self._norm(x, p + "norm.weight") @ self.state[p + "lm_head.weight"].T
            sums[h + 1] = sums[h + 1] + self._cross_entropy(logits, tokens, start, end, reach, h + 2)

    def _cross_entropy(self, logits, tokens, start, end, reach, ahead):
        total = torch.zeros((), dtype=torch.float64)
        for t in range(start, end):
            if t + ahead < reach:
                total = total - self.weights[t + ahead] * torch.log_softmax(logits[t - start], -1)[tokens[t + ahead]]
        return total

    def _norm(self, x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config.norm_eps) * (1 + self.state[name])

    def _block(self, x, prefix, kind, moe_layer):
        x = x + self._attention(self._norm(x, prefix + "attention_norm.weight"), prefix + "attention.", kind)
        h = self._norm(x, prefix + "ffn_norm.weight")
        if moe_layer is None:
            return x + self._swiglu(h, prefix + "mlp.", None)
        shared = self._swiglu(h, prefix + "moe.shared.", self.stage.limits.shared.get(moe_layer))
        routed = [self._experts(token, moe_layer) for token in h]
        return x + shared + torch.stack(routed)

    def _swiglu(self, x, prefix, limit):
        gate, up, down = (self.state[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
        return self._clipped(x @ gate.T, x @ up.T, limit) @ down.T

    def _clipped(self, gate, up, limit):
        gate = gate * torch.sigmoid(gate)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * up

    def _experts(self, x, layer):
        moe, prefix, limit = self.config.moe, f"layers.{layer}.moe.", self.stage.limits.routed.get(layer)
        logits = self.state[prefix + "router.weight"] @ x
        p = torch.sigmoid(logits)
        ranked = sorted(
            range(moe.num_experts), key=lambda e: (-float((p[e] + self.state[prefix + "router.bias"][e]).detach()), e)
        )
        chosen = ranked[: moe.top_k]
        self.routed.setdefault(layer, []).append((logits, chosen))
        total = sum(p[e] for e in chosen)
        y = torch.zeros_like(x)
        for e in chosen:
            gate, up, down = (self.state[f"{prefix}experts.w_{name}"][e] for name in ("gate", "up", "down"))
            y = y + p[e] / total * moe.scaling_factor * (down @ self._clipped(gate @ x, up @ x, limit))
        return y

    def _attention(self, x, prefix, kind):
        config = self.config.full if kind == "F" else self.config.sliding
        T, A, H, K = len(x), self.config.head_dim, config.num_heads, config.num_kv_heads
        q, k, v = (
            (x @ self.state[f"{prefix}{name}_proj.weight"].T).view(T, heads, A)
            for name, heads in (("q", H), ("k", K), ("v", K))
        )
        q, k = self._norm(q, prefix + "q_norm.weight"), self._norm(k, prefix + "k_norm.weight")
        q, k = self._rotate(q, kind), self._rotate(k, kind)
        reach = T if config.window is None else config.window
        hidden = torch.tensor([[not t - reach < s <= t for s in range(T)] for t in range(T)])
        heads = []
        for head in range(H):
            kv = head // (H // K)
            scores = (q[:, head] @ k[:, kv].T / math.sqrt(A)).masked_fill(hidden, -math.inf)
            heads.append(torch.softmax(scores, -1) @ v[:, kv])
        gate = torch.sigmoid(x @ self.state[prefix + "gate_proj.weight"].T)
        return (torch.stack(heads, 1) * gate[..., None]).reshape(T, H * A) @ self.state[prefix + "o_proj.weight"].T

    def _rotate(self, x, kind):
        config = self.config.full if kind == "F" else self.config.sliding
        theta = self.stage.rope_theta_full if kind == "F" else self.stage.rope_theta_sliding
        rotated = int(self.config.head_dim * config.rotary_share)
        half = rotated // 2
        y = x.clone()
        for i in range(half):
            frequency = theta ** (-2 * i / rotated)
            if kind == "F" and self.config.rope_scaling is not None:
                frequency = self._scaled(frequency)
            angle = torch.arange(len(x), dtype=torch.float64)[:, None] * frequency
            y[..., i] = x[..., i] * angle.cos() - x[..., half + i] * angle.sin()
            y[..., half + i] = x[..., half + i] * angle.cos() + x[..., i] * angle.sin()
        return y

    def _scaled(self, frequency):
        s = self.config.rope_scaling
        turns = s.original_max_positions * frequency / (2 * math.pi)
        if turns < s.low_freq_factor:
            return frequency / s.factor
        if turns > s.high_freq_factor:
            return frequency
        smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        return (1 - smooth) * frequency / s.factor + smooth * frequency


def naive_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and buffers as float64 leaves."""
    return {name: t.detach().double().requires_grad_(t.is_floating_point()) for name, t in model.state_dict().items()}
