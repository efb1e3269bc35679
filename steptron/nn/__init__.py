"""Single-device maths of the network. Nothing here knows of ranks; distribution is applied from outside.

    packing.py         document borders of a batch, as host integers and as tensors
    rope.py            positions → cos/sin tables → rotated queries and keys
    matmul.py          the matrix product used by the other modules · linear.py its layer
    attention.py       projections, norms, RoPE, kernel, head gate · block_attention.py the exact kernel
    norm.py            zero-centred RMSNorm
    elementwise.py     norm, norm with RoPE and gate, by torch or by Triton (elementwise_triton.py)
    triton_parts.py    what the kernels of all packages share · triton_launch.py their launch and tiles
    mlp.py             SwiGLU with activation limits
    embedding.py       embedding and output matrix
    loss.py            losses, log-probabilities and logits, one chunk of tokens at a time · roofs.py peaks of devices
    to_local.py        the part of a parameter on this rank · shard_geometry.py its offset and size
    recompute.py       tensors that backward recomputes

Data flow of a layer:  x ─ norm ─ q,k,v ─ q/k norm ─ RoPE ─ kernel(packing) ─ gate ─ o_proj ─ + x ─ norm ─ FFN ─ + x
"""
