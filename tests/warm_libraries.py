"""Imported once by the server of `warm_server.py`: the libraries, and what they would find out in every process."""

import functools

import cpuinfo
import datasets  # noqa: F401
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import matplotlib.figure  # noqa: F401
import scipy.stats  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401
from deepspeed.accelerator import get_accelerator

# DeepSpeed's CPU Adam asks for the processor three times, a second each.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
# Else every rank would ask ninja whether the operators are built.
for _operator in ("CPUAdamBuilder", "ShareMemCommBuilder"):
    get_accelerator().create_op_builder(_operator).load(verbose=False)
