"""The pieces in which engines and trainer work: what they allocate follows from these, and so does what is planned."""

PROMPT_PIECE = 256  # tokens of a prompt that are computed at once, at most
BACKGROUND_CONTEXT = 2048  # tokens of the longest example that passes use, unless a request may use fewer

# Engine llama.cpp
MICRO_BATCH = 128  # tokens of a decode
RECURRENT_SEQUENCES = 16  # at once in a session of a model with a recurrent state, of which each sequence has one
DRIFT_ROWS = 40  # of a neutral text: all of these distributions are kept for the base
SCORED_ROWS = 16, 64  # with logits in one decode, at least and at most
SCORED_BYTES = 16 << 20  # that they may take: llama.cpp keeps n_vocab floats of each, and as many in its graph

# Engine transformers
LOSS_TOKENS = 1024  # of a forward that makes a loss, for which perturbed weights are made once a forward
# Numbers of rows of which a product in bfloat16 has a multiple, alone and where a backward follows: oneDNN compiles
# code for every number that it meets, some 20 MB with the backward's.
PRODUCT_ROWS, GRADIENT_ROWS = 64, 256
JOINT_ROWS = 4  # the same where several sequences have their next tokens computed together, which are few
PERTURBED_PIECE = 1 << 20  # weights of a matrix that are perturbed at a time

# Trainer
PART_WEIGHTS = 9 << 17  # of a matrix that are dequantised at once: 4.5 MiB in float32, which stay in the cache
# Bytes that dequantised blocks may take: all that train together, and one that is in memory at a time. Matrices of
# larger ones stay in the file, and a part of one is made whenever it is multiplied.
TOGETHER_BYTES, ONE_BLOCK_BYTES = 256 << 20, 32 << 20
MICRO_LEAST, MICRO_MOST = 128, 384  # tokens of a micro-batch
ROW_STEP = 32  # rows are rounded up to multiples of it, or of more, where they are multiplied


def scored_rows(n_vocab: int) -> int:
    """With logits in one decode of engine llama.cpp."""
    least, most = SCORED_ROWS
    return max(least, min(most, SCORED_BYTES // (4 * max(1, n_vocab))))


def joint_rows(n: int) -> int:
    """To how many rows `n` of several sequences are padded: few numbers, as each costs code, and not much more to
    compute."""
    if n > PRODUCT_ROWS // 2:
        return n + -n % PRODUCT_ROWS
    return max(JOINT_ROWS, 1 << (n - 1).bit_length())


def attends_apart(prefix: int, rows: int) -> bool:
    """Whether what all examples begin with attends by itself in the trainer: from a quarter of a forward pass's rows on
    it pays that every block keeps these outputs a second time."""
    return 4 * prefix >= rows
