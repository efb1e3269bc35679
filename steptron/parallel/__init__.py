"""How a finished model is laid over ranks: the meshes, what is applied to the model, and quantities over all ranks.

recipe.parallel → mesh.py → apply.py (fsdp.py …) → the model, sharded
                            grad_norm.py, collectives.py → one number for all ranks
"""
