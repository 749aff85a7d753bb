"""moejax: Mixture-of-Experts routing, tried, compared and scaled in JAX.

The legend of every name in the code. `x_TD` is an array of T rows and D columns; einsum letters are the
same letters in lower case.

    B batch (sequences)      E experts                   V vocabulary
    S sequence               K experts per token         L layers
    T = B S tokens           C capacity, slots           H heads, G kv heads (or groups of tokens), A head width
    D model width            N assignments (token, expert)
    F feed-forward hidden
"""

__version__ = "0.1.0"
