"""Networks for use elsewhere: programs, ONNX files, state dicts, applied masks, model cards.

A program of torch.export loads without this package and without the network's class. Whole channels
and heads that were removed leave the network first, and a loader cuts its class alike. All files
are loaded again and compared with the pruned network before anything is written. A network that
torch.export cannot take leaves as a state dict, and its card says why. Speed is what was measured
beside the dense network. A record is data: code that it names runs only if it is built in or the
caller trusts it by name.
"""
