"""What GPUs can do: dense peak rates, memory and power of known models, and which one a device is.

An MFU against a wrong peak is worse than none. A device is therefore known only if its whole name fits one row and
it has that row's number of multiprocessors; laptop chips, slices (MIG, vGPU) and cut-down variants under a similar
name fit none, and their peak is unknown.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from stage import UserError


@dataclass(frozen=True)
class Gpu:
    """A model of GPU. Rates are dense (no sparsity) TFLOP/s with fp32 accumulation at the nominal boost clock."""

    name: str  # as `--hardware` takes it
    pattern: str  # of the whole device name, without "NVIDIA", "Tesla", "GeForce"
    multiprocessors: int
    half: float  # bf16 and fp16; of a GPU without bf16, fp16 alone
    single: float  # what an fp32 matrix product reaches with TF32 allowed, where there is TF32
    plain: float  # fp32 without tensor cores
    memory: int  # GB, of the smallest version
    watts: int  # board power
    has_bf16: bool = True


# Sources, all NVIDIA's. GeForce tensor cores do fp16 with fp32 accumulation at half of the fp16-accumulate rate that
# is advertised; the figures here are the former, from the appendices of the white papers.
#   GA102 (3090, A6000)  https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf
#   Ada (4090, 6000 Ada, L40)  https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf
#   RTX Blackwell (5090)  https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
#   V100, A100, H100, H200, B200, A10, A30, A40, L4, L40S, T4: the data sheets at https://www.nvidia.com/en-us/data-center/
#   A800 and H800 are A100 and H100 with slower links; H20, L20: the China data sheets, as listed in
#   https://www.tomshardware.com/pc-components/gpus/new-nvidia-ai-gpus-designed-to-get-around-us-export-bans-come-to-china-h20-l20-and-l2-to-fill-void-left-by-restricted-models
#   4090 D: no official rate; that of the 4090 by multiprocessors and nominal clock (2.52 GHz both).
GPUS = (
    #   name, pattern of the whole device name, multiprocessors, half, single, plain, GB, W
    Gpu("3090", "RTX 3090", 82, 71.0, 35.6, 35.6, 24, 350),
    Gpu("3090 Ti", "RTX 3090 Ti", 84, 80.0, 40.0, 40.0, 24, 450),
    Gpu("4090", "RTX 4090", 128, 165.2, 82.6, 82.6, 24, 450),
    Gpu("4090 D", "RTX 4090 D", 114, 147.1, 73.5, 73.5, 24, 425),
    Gpu("5090", "RTX 5090", 170, 209.5, 104.8, 104.8, 32, 575),
    Gpu("RTX A6000", "RTX A6000", 84, 154.8, 77.4, 38.7, 48, 300),
    Gpu("RTX 6000 Ada", "RTX 6000 Ada Generation", 142, 364.2, 182.1, 91.1, 48, 300),
    Gpu("V100", "V100-SXM2-(16|32)GB", 80, 125.0, 15.7, 15.7, 16, 300, has_bf16=False),
    Gpu("V100 PCIe", "V100-PCIE-(16|32)GB", 80, 112.0, 14.0, 14.0, 16, 250, has_bf16=False),
    Gpu("T4", "T4", 40, 65.0, 8.1, 8.1, 16, 70, has_bf16=False),
    Gpu("A10", "A10", 72, 125.0, 62.5, 31.2, 24, 150),
    Gpu("A30", "A30", 56, 165.0, 82.0, 10.3, 24, 165),
    Gpu("A40", "A40", 84, 149.7, 74.8, 37.4, 48, 300),
    Gpu("A100", "A100-SXM4?-(40|80)GB", 108, 312.0, 156.0, 19.5, 40, 400),
    Gpu("A100 PCIe", "A100-PCIE-40GB|A100 80GB PCIe", 108, 312.0, 156.0, 19.5, 40, 300),
    Gpu("A800", "A800-SXM4-(40|80)GB", 108, 312.0, 156.0, 19.5, 40, 400),
    Gpu("A800 PCIe", "A800-PCIE-40GB|A800 80GB PCIe", 108, 312.0, 156.0, 19.5, 40, 300),
    Gpu("L4", "L4", 58, 121.0, 60.0, 30.3, 24, 72),
    Gpu("L20", "L20", 92, 119.5, 59.8, 59.8, 48, 275),
    Gpu("L40", "L40", 142, 181.0, 90.5, 90.5, 48, 300),
    Gpu("L40S", "L40S", 142, 362.0, 183.0, 91.6, 48, 350),
    Gpu("H20", "H20", 78, 148.0, 74.0, 44.0, 96, 400),
    Gpu("H100", "H100 80GB HBM3", 132, 989.4, 494.7, 66.9, 80, 700),
    Gpu("H100 PCIe", "H100 PCIe", 114, 756.0, 378.0, 51.2, 80, 350),
    Gpu("H100 NVL", "H100 NVL", 132, 835.5, 417.5, 60.0, 94, 400),
    Gpu("H800", "H800", 132, 989.4, 494.7, 66.9, 80, 700),
    Gpu("H800 PCIe", "H800 PCIe", 114, 756.0, 378.0, 51.2, 80, 350),
    Gpu("H200", "H200", 132, 989.4, 494.7, 66.9, 141, 700),
    Gpu("H200 NVL", "H200 NVL", 132, 835.5, 417.5, 60.0, 141, 600),
    Gpu("GH200", "GH200 (120|480)GB", 132, 989.4, 494.7, 66.9, 96, 900),
    Gpu("B200", "B200", 148, 2250.0, 1125.0, 75.0, 180, 1000),
)


def identify(device_name: str, multiprocessors: int | None = None) -> Gpu | None:
    """The model of a device by its full name, e.g. "NVIDIA GeForce RTX 3090"; None unless that is certain.

    multiprocessors: of the device; a different number than the model's means a variant or a slice of it.
    """
    bare = re.sub(r"^(NVIDIA )?(Tesla |GeForce )?", "", device_name.strip())
    for gpu in GPUS:
        if re.fullmatch(gpu.pattern, bare):
            return gpu if multiprocessors in (None, gpu.multiprocessors) else None
    return None


def identify_device(device: torch.device) -> Gpu | None:
    """The model of a device of this machine."""
    if device.type != "cuda" or torch.version.hip:
        return None
    properties = torch.cuda.get_device_properties(device)
    return identify(properties.name, properties.multi_processor_count)


def peak_flops(gpu: Gpu, dtype: torch.dtype, tf32: bool = True) -> float | None:
    """Dense peak FLOP/s of a GPU for matrix products in `dtype`; None where it cannot do them.

    tf32: whether fp32 products may use TF32, torch.get_float32_matmul_precision() != "highest".
    """
    if dtype == torch.float32:
        return 1e12 * (gpu.single if tf32 else gpu.plain)
    if dtype == torch.bfloat16 and not gpu.has_bf16:
        return None
    return 1e12 * gpu.half if dtype in (torch.bfloat16, torch.float16) else None


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of a device of this machine in the precision in use; None where it is not known."""
    gpu = identify_device(device)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_flops(gpu, dtype, tf32) if gpu else None


def parse_hardware(text: str) -> tuple[Gpu, int]:
    """`4090 x4` -> (the 4090, 4); a name alone is one GPU."""
    match = re.fullmatch(r"\s*(.+?)(?:\s*[x×*]\s*(\d+))?\s*", text)
    name, count = (match[1], int(match[2] or 1)) if match else (text, 0)
    wanted = re.sub(r"^(nvidia|geforce|tesla|rtx|\s)+", "", name.lower())
    for gpu in GPUS:
        if count and wanted in (gpu.name.lower(), gpu.name.lower().removeprefix("rtx ")):
            return gpu, count
    raise UserError(
        f'--hardware 不认识“{text}”；写法如 "4090 x4"，认识的有：{"、".join(g.name for g in GPUS)}。'
    )


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory that this process can count on: of the GPU, or of the machine (or its container)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if sys.platform == "win32":
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return min(limits)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory held so far, in GB (10^9 bytes): `rss_gb` of this process, `gpu_gb` allocated on its GPU.

    Both are counters that the system keeps: reading them does not wait for the GPU.
    """
    figures = {}
    if (resident := peak_resident()) is not None:
        figures["rss_gb"] = resident / 1e9
    if device.type == "cuda":
        figures["gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return figures


def peak_resident() -> int | None:
    """Peak resident set size of this process in bytes; None where the system does not say."""
    try:  # unlike getrusage's, this peak does not include that of the process which started this one
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
