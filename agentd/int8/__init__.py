"""Integer-only learning of small classifiers: ElasticZO-INT8.

A tensor is int8 mantissas and one exponent (NITI, Wang et al. 2020). The trunk learns by zeroth-order steps whose
projected gradient is the sign of an integer loss difference, the last layers by backpropagation in integers
(Sugiura and Matsutani, "ElasticZO", 2025). Between the quantised input and the updated weight no floating-point number
is made: `tests/unit/int8/test_integers.py` fails on the first. Needs torch, so the daemon imports no more of it than
the descriptions: architecture, window and memory.

    architecture  networks as data                 network      forward, backward, errors of one batch
    tensor        mantissas and exponent           elastic      ElasticZO-INT8: one training step
    rounding      shifts                           floating     the same networks in fp32
    kernels       int8 x int8 -> int32             sign_ledger  the zeroth-order part of a run, 10 bytes a step
    noise         perturbations from their seed    weights      safetensors and post-training quantisation
    loss          integer cross-entropy            step_memory  the memory model of the paper
"""
