"""Single-device maths of the network. Nothing here knows of ranks; what must be spread is spread from outside.

    packing.py   which tokens are one document, as host integers and as tensors
    rope.py      positions → cos/sin tables → rotated queries and keys
    matmul.py    the matrix product of all that follows · linear.py its layer
    attention.py projections, norms, RoPE, kernel, head gate · blocks.py the kernels' exact blocks of queries
    norm.py      zero-centred RMSNorm
    mlp.py       SwiGLU with activation limits
    embedding.py embedding and output matrix
    loss.py      losses, log-probabilities and logits, a chunk of tokens at a time
    local.py     a parameter as this rank holds it · rectangles.py which part of the whole that is
    recompute.py tensors that backward computes again

A layer's data flow:  x ─ norm ─ q,k,v ─ q/k norm ─ RoPE ─ kernel(packing) ─ gate ─ o_proj ─ + x ─ norm ─ FFN ─ + x
"""
