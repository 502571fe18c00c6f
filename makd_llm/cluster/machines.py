"""The rates of machines, as their makers state them; all others can be given by hand.

Rates are per device and, for links, in one direction. Sources: NVIDIA's data sheets of the H100
SXM, the H200 SXM and the A100 SXM (dense bf16, without sparsity; NVLink and PCIe are stated there
for both directions together), and of the DGX H100, H200 and A100 for the network (eight adapters of
400 or 200 Gb/s, one for each device). Memory is what torch calls a device's total capacity (where
it ran out of it, as in vllm-project/vllm issue 27508: 79.11 GiB of an H100), which is more than the
name says in GB: most names mean GiB, of which the driver keeps a little. The CPU's rates are those
of a core of the machine on which benchmarks/results/plan_cpu.csv was measured, by
benchmarks/measure.py; its network is a guess of 10 Gb/s.
"""

from dataclasses import dataclass

from makd_llm.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One device and what connects it.

    Attributes:
        flops, flops_fp32: operations per second of matrix products in bf16, and in fp32.
        bandwidth: bytes per second of its memory.
        memory: bytes.
        near: bytes per second that it sends to a device of its own machine.
        far: bytes per second that its adapter sends to another machine; a CPU's processes share it.
        host: bytes per second to the host's memory.
    """

    name: str
    flops: float
    flops_fp32: float
    bandwidth: float
    memory: float
    near: float
    far: float
    host: float
    on_cpu: bool = False


MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("h100", 989e12, 67e12, 3.35e12, 79.1 * GIB, 450e9, 50e9, 64e9),
        Machine("h200", 989e12, 67e12, 4.8e12, 139.7 * GIB, 450e9, 50e9, 64e9),
        Machine("a100", 312e12, 19.5e12, 2.04e12, 79.1 * GIB, 300e9, 25e9, 32e9),
        Machine("a100-40", 312e12, 19.5e12, 1.56e12, 39.4 * GIB, 300e9, 25e9, 32e9),
        Machine("cpu", 0.08e12, 0.08e12, 5e9, 12e9, 2e9, 1.25e9, 5e9, on_cpu=True),
    )
}


def machine_named(name: str) -> Machine:
    """Raises UserError for one that is not in the table."""
    if name not in MACHINES:
        raise UserError(
            f"--gpu {name}: not one of {', '.join(MACHINES)}; give the nearest, and its rates with "
            "--memory, --flops, --bandwidth and --link"
        )
    return MACHINES[name]
