"""The int8 engine: a small integer classifier that serves, scores and learns in one process.

model     the file: network, classes, scaling       engine    serving, staged revisions, hot swap
inputs    arrays and PNG images as tensors          session   a pass's background work: encode, score, learn
quantise  makes a model file of float weights (`python -m agentd.engine.int8.quantise --help`)
"""
