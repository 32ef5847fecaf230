"""Every Triton kernel compiles for NVIDIA and AMD GPUs without one, keeps its values in registers and rounds by IEEE.

What is compiled is what the launchers launch: their calls on tensors without memory are recorded instead of run, so
the specialisations cannot drift from the code, and a kernel that no call here reaches fails the first test.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402  (after importorskip)
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from iexact_runner.kernels import triton as triton_kernels  # noqa: E402
from iexact_runner.kernels.reference import chunk_bytes, chunk_rows, stored_dtype  # noqa: E402
from iexact_runner.kernels.triton import (  # noqa: E402
    blocks,
    coefficients,
    elementwise,
    product,
    quantizer,
    signs,
)

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNT = 1 << 14
LEVELS = (0.0, 1.1, 1.9, 3.0)
MANY_LEVELS = tuple(level * level / 255 for level in range(256))
# Kernels allowed to spill, as {(kernel, label, target): reason}.
SPILLS: dict[tuple[str, str, str], str] = {}
# The floor of h >= 0: flushing a subnormal h to 0 first changes nothing.
HARMLESS = ("cvt.rmi.ftz.f32.f32",)
# An IEEE division is expanded into fused multiply-adds, so their absence shows nothing of the kernels that divide.
DIVIDING = {"_quantize_kernel", "_extrema_kernel", "_codes_kernel", "_quantize_product_kernel"}
# Kernels with a matrix product, which has a tolerance; what follows it may not be fused.
MULTIPLYING = {"_quantize_product_kernel"}


class Launch(NamedTuple):
    kernel: Any
    label: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Compiled(NamedTuple):
    launch: Launch
    target: str
    assembly: str
    machine_code: str
    registers: int
    spills: int

    def __str__(self) -> str:
        name = f"{self.launch.kernel.__name__}[{self.launch.label}]"
        return f"{name:64} {self.target:7} {self.registers:4} registers, {self.spills} bytes or registers spilled"


def calls() -> Iterator[tuple[str, Any]]:
    """A label and a call for each specialisation worth compiling."""
    for name, dtype, bits, block_size, levels, offset, count in (
        ("float32 2", torch.float32, 2, 256, None, 0, COUNT),
        ("float32 2 short blocks", torch.float32, 2, 32, None, 0, COUNT),
        ("float32 2 long blocks", torch.float32, 2, 8192, None, 0, COUNT),
        ("float32 2 levels", torch.float32, 2, 256, LEVELS, 0, COUNT),
        ("float32 2 shifted", torch.float32, 2, 256, None, 3, COUNT),
        ("float32 2 odd", torch.float32, 2, 63, None, 0, COUNT + 1),
        ("float32 2 quarters", torch.float32, 2, 76, LEVELS, 0, COUNT),
        ("float32 2 huge blocks", torch.float32, 2, 10**5, None, 0, COUNT),
        ("float32 1", torch.float32, 1, 1024, None, 0, COUNT),
        ("bfloat16 4", torch.bfloat16, 4, 256, None, 0, COUNT),
        ("float16 8", torch.float16, 8, 64, None, 0, COUNT),
        ("float32 8 levels", torch.float32, 8, 256, MANY_LEVELS, 0, COUNT),
        ("float16 8 odd levels", torch.float16, 8, 63, MANY_LEVELS, 0, COUNT + 1),
        ("float16 8 odd", torch.float16, 8, 63, None, 5, COUNT),
        ("bfloat16 1 single", torch.bfloat16, 1, 16, None, 8, 16),
        ("float32 8 single odd", torch.float32, 8, 1, None, 0, 1),
        ("float32 2 over 2**32", torch.float32, 2, 64, None, 2**40, 2**37),
        ("float32 4 over 2**32 quarters", torch.float32, 4, 3 * 2**36, None, 2**40, 2**38 + 4),
    ):
        x = torch.empty(count, dtype=dtype, device="meta")
        form = {"bits": bits, "block_size": block_size, "levels": levels}
        zero = torch.empty(-(-count // block_size), dtype=stored_dtype(dtype), device="meta")
        codes = torch.empty(-(-count * bits // 8), dtype=torch.uint8, device="meta")
        yield name, lambda x=x, form=form, offset=offset: triton_kernels.quantize(x, **form, seed=1, offset=offset)
        yield (
            name,
            lambda x=x, form=form, stored=(codes, zero, zero): triton_kernels.dequantize(
                *stored, **form, shape=tuple(x.shape), dtype=x.dtype
            ),
        )
    yield from block_calls()
    yield from sketch_calls()
    slope, random = {"negative_slope": 0.1}, {"p": 0.3, "seed": 1}
    mask = torch.empty(COUNT // 8, dtype=torch.uint8, device="meta")
    yield "float32", lambda: triton_kernels.dropout_mask(COUNT, device=mask.device, **random)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(COUNT, dtype=dtype, device="meta")
        name = str(dtype).removeprefix("torch.")
        yield name, lambda x=x: triton_kernels.leaky_relu(x, **slope)
        yield name, lambda x=x: triton_kernels.leaky_relu_backward(x, mask, **slope)
        yield name, lambda x=x: triton_kernels.apply_dropout_mask(x, mask, p=0.3)
        yield name, lambda x=x: triton_kernels.dropout(x, **random)
        yield name, lambda x=x: triton_kernels.leaky_relu_dropout(x, **slope, **random)
        yield name, lambda x=x: triton_kernels.leaky_relu_dropout_backward(x, mask, **slope, **random)
        yield name, lambda x=x: triton_kernels.rademacher(128, 128, seed=1, dtype=x.dtype, device=x.device)


def block_calls() -> Iterator[tuple[str, Any]]:
    """Calls of the fused passes of a block, at usual and at awkward widths."""
    for width, rank, dtype, p in (
        (128, 8, torch.float32, 0.5),
        (512, 16, torch.float32, 0.0),
        (63, 5, torch.float32, 0.5),
        (256, 64, torch.bfloat16, 0.5),
        (128, 0, torch.float32, 0.5),
        (63, 0, torch.float32, 0.0),
    ):
        h, mask = (
            torch.empty(1024, width, dtype=dtype, device="meta"),
            torch.empty(128 * width, dtype=torch.uint8, device="meta"),
        )
        # Without directions of its own a sketch holds the columns.
        vector, directions = (torch.empty((width, rank)[:size], device="meta") for size in (1, 2 if rank else 1))
        c, random = torch.empty(1024, rank or width, device="meta"), {"p": p, "seed": 1}
        name = f"{str(dtype).removeprefix('torch.')} {width}{' odd' if width % 8 else ''} rank {rank} p {p}"
        calls: tuple[tuple[Any, tuple[Any, ...]], ...] = (
            (triton_kernels.normalize_relu_dropout, (h, *[vector] * 4)),
            (triton_kernels.decode_relu_dropout, (c, directions, vector, mask)),
            (triton_kernels.decode_relu_dropout, (c, directions, vector, None)),
            (triton_kernels.gated_sums, (h, mask, c, directions)),
            (triton_kernels.gated_gradient, (h, mask, c, directions, vector, vector)),
        )
        for call, tensors in calls:
            yield name, lambda call=call, tensors=tensors, random=random: call(*tensors, **random)
    # Those of the preset at two ranks, the smallest block, and the largest of both.
    forms = ((128, 8, 4, 4, None), (256, 16, 4, 4, None), (500, 8, 1, 2, LEVELS), (512, 64, 64, 8, None))
    for width, rank, rows, bits, levels in forms:
        z, matrix = torch.empty(1024, width, device="meta"), torch.empty(width, rank, device="meta")
        form = {"bits": bits, "block_size": rows * rank, "levels": levels, "seed": 1}
        shift = torch.empty(rank, device="meta")
        yield (
            f"{width} rank {rank} rows {rows} int{bits}",
            lambda z=z, matrix=matrix, shift=shift, form=form: triton_kernels.quantize_product(
                z, matrix, shift, **form
            ),
        )


def sketch_calls() -> Iterator[tuple[str, Any]]:
    """Calls of what keeps coefficients and signs: the usual width, an odd one, the widest."""
    bits, levels = torch.empty(18, dtype=torch.int32, device="meta"), torch.empty(512, device="meta")
    c, codes = torch.empty(1024, 18, device="meta"), torch.empty(1024, 6, dtype=torch.uint8, device="meta")
    for seed in (None, 1):
        form = {"width": 48, "seed": seed}
        yield f"48 seed {seed}", lambda form=form: triton_kernels.quantize_coefficients(c, bits, levels, **form)
    yield "48", lambda: triton_kernels.dequantize_coefficients(codes, bits, levels)
    for width, rank, exact, p in (
        (128, 18, False, 0.5),
        (63, 18, True, 0.5),
        (512, 18, True, 0.5),
        (128, 0, False, 0.5),
        (512, 0, False, 0.5),
    ):
        vector, directions = (torch.empty((width, rank)[:size], device="meta") for size in (1, 2 if rank else 1))
        sketch = (torch.empty(1024, rank or width, device="meta"), directions, vector, vector)
        mask = torch.empty(128 * width, dtype=torch.uint8, device="meta")
        chunks = -(-1024 // chunk_rows(width))
        counts = torch.empty(2, chunks, dtype=torch.int32, device="meta")
        streams = torch.empty(chunks, chunk_bytes(width), dtype=torch.uint8, device="meta")
        options = {"exact": exact, "p": p, "seed": 1}
        for call, tensors in (
            (triton_kernels.pack_signs, (mask, *sketch)),
            (triton_kernels.unpack_signs, (mask, counts, *sketch)),
        ):
            yield (
                f"{width} rank {rank} {options}",
                lambda call=call, tensors=tensors, options=options: call(*tensors, **options),
            )
        form = {"capacity": 99}
        yield f"{width}", lambda parts=(streams, counts), form=form: triton_kernels.join_streams(*parts, **form)


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    """What the launchers would launch on a GPU."""
    recorded: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for label, call in calls():

            def record(
                kernel: Any, *arguments: Any, grid: Any, warmup: bool, _label: str = label, **options: Any
            ) -> None:
                recorded.append(Launch(kernel, _label, arguments, options))

            patch.setattr(JITFunction, "run", record)
            call()
    return recorded


@pytest.fixture(scope="module")
def compiled(launches: list[Launch], tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_for(name, launch, folder) for launch in launches for name in TARGETS]


def compile_for(name: str, launch: Launch, folder: Path) -> Compiled:
    """Compiles a launch as Triton would when it runs on ``TARGETS[name]``."""
    kernel, target = launch.kernel, TARGETS[name]
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.options)
    keywords = {**launch.options, "debug": False}
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    binary = triton.compile(ASTSource(kernel, signature, constants, attributes), target, options.__dict__)
    if target.backend == "cuda":
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        command = [str(BINARIES / "cuobjdump"), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = (
            int(found[1]) for found in re_find(usage, r"REG:(\d+)", r"STACK:(\d+)", r"LOCAL:(\d+)")
        )
        machine_code = ""
        if kernel.__name__ not in DIVIDING:  # disassembling takes longer than compiling
            command = [str(BINARIES / "nvdisasm"), "-c", str(cubin)]
            machine_code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert "EXIT" in machine_code
        return Compiled(launch, name, binary.asm["ptx"], machine_code, registers, stack + local)
    text = binary.asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    registers, *spills = (int(found[1]) for found in re_find(text, *(rf"\.{name}:\s+(\d+)" for name in names)))
    return Compiled(launch, name, text, text, registers, sum(spills))


def re_find(text: str, *patterns: str) -> list[re.Match[str]]:
    """The first match of each pattern, which must exist."""
    found = [re.search(pattern, text) for pattern in patterns]
    assert all(found), f"{patterns} in {text[:2000]}"
    return [match for match in found if match]


def test_every_kernel_is_compiled(launches: list[Launch]) -> None:
    kernels = {
        name
        for module in (blocks, coefficients, elementwise, product, quantizer, signs)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels
    assert {launch.kernel.__name__ for launch in launches} == kernels


def test_other_directions_compile_nothing() -> None:
    def compiled_for(rank: int) -> set[str]:
        c, v = torch.empty(1024, rank, device="meta"), torch.empty(128, rank, device="meta")
        h, vector = torch.empty(1024, 128, device="meta"), torch.empty(128, device="meta")
        mask, random = torch.empty(128 * 128, dtype=torch.uint8, device="meta"), {"p": 0.5, "seed": 1}
        chunks = 1024 // chunk_rows(128)
        counts = torch.empty(2, chunks, dtype=torch.int32, device="meta")
        bits, levels = torch.empty(rank, dtype=torch.int32, device="meta"), torch.empty(512, device="meta")
        keys = set()

        def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS["sm_90"]))
            keys.add(f"{kernel.__name__} {bind(*arguments, **options)[1]}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JITFunction, "run", record)
            triton_kernels.decode_relu_dropout(c, v, vector, mask, **random)
            triton_kernels.gated_sums(h, mask, c, v, **random)
            triton_kernels.gated_gradient(h, mask, c, v, vector, vector, **random)
            for exact in (False, True):
                triton_kernels.pack_signs(mask, c, v, vector, vector, exact=exact, **random)
                triton_kernels.unpack_signs(mask, counts, c, v, vector, vector, exact=exact, **random)
            triton_kernels.quantize_coefficients(c, bits, levels, width=48, seed=None)
            triton_kernels.dequantize_coefficients(torch.empty(1024, 6, dtype=torch.uint8, device="meta"), bits, levels)
        return keys

    assert len(compiled_for(18)) == 9
    assert compiled_for(18) == compiled_for(24) == compiled_for(31)
    assert len(compiled_for(64) - compiled_for(18)) == 1, "decoding knows the next power of two"


def test_every_launch_forbids_fused_multiply_add(launches: list[Launch]) -> None:
    assert all(launch.options["enable_fp_fusion"] is False for launch in launches)


def test_nothing_spills(compiled: list[Compiled], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():  # the figures belong into the log of every run, not only of a failed one
        print(f"\n{'registers (most of any specialisation)':40}" + "".join(f"{name:>8}" for name in TARGETS))
        for kernel in sorted({item.launch.kernel.__name__ for item in compiled}):
            of_kernel = [item for item in compiled if item.launch.kernel.__name__ == kernel]
            most = {name: max(item.registers for item in of_kernel if item.target == name) for name in TARGETS}
            spilled = sum(item.spills for item in of_kernel)
            print(f"{kernel:40}" + "".join(f"{most[name]:8}" for name in TARGETS) + f"  {spilled} spilled")
    print("\n".join(map(str, compiled)))
    spilling = {(item.launch.kernel.__name__, item.launch.label, item.target) for item in compiled if item.spills}
    assert spilling == set(SPILLS)


def test_nvidia_arithmetic_is_ieee(compiled: list[Compiled]) -> None:
    for item in compiled:
        if TARGETS[item.target].backend == "cuda":
            assembly = item.assembly
            for harmless in HARMLESS:
                assembly = assembly.replace(harmless, "")
            if item.launch.kernel.__name__ in MULTIPLYING:
                assembly = assembly.replace("fma.rn.f32", "")
            assert not re.findall(r"div\.full|\bfma\.|\bmad\.\w+\.f32|\.ftz|\.approx", assembly), item


def test_only_divisions_multiply_and_add_at_once(compiled: list[Compiled]) -> None:
    for item in compiled:
        if item.launch.kernel.__name__ not in DIVIDING:
            assert not re.findall(r"\bFFMA|\bv_(?:pk_)?(?:fma|fmac|mac|mad)_f32", item.machine_code), item
        elif TARGETS[item.target].backend == "hip":
            assert "v_div_fixup_f32" in item.machine_code, item


def test_amd_keeps_subnormals(compiled: list[Compiled]) -> None:
    for item in compiled:
        if TARGETS[item.target].backend == "hip":
            (mode,) = re_find(item.assembly, r"\.amdhsa_float_denorm_mode_32\s+(\d+)")
            assert mode[1] == "3", item


def test_float32_maps_move_16_bytes_at_once(compiled: list[Compiled]) -> None:
    streaming = {
        "_quantize_kernel": r"ld\.global\.v4\.b32",
        "_dequantize_kernel": r"st\.global\.v4\.b32",
        "_dropout_kernel": r"ld\.global\.v4\.b32",
        "_leaky_relu_kernel": r"ld\.global\.v4\.b32",
        "_normalize_relu_dropout_kernel": r"ld\.global\.v4\.b32",
        "_gated_sums_kernel": r"ld\.global\.v4\.b32",
        "_gated_gradient_kernel": r"st\.global\.v4\.b32",
        "_decode_relu_dropout_kernel": r"st\.global\.v4\.b32",
    }
    for item in compiled:
        pattern = streaming.get(item.launch.kernel.__name__)
        if pattern and TARGETS[item.target].backend == "cuda" and "odd" not in item.launch.label:
            assert re.search(pattern, item.assembly), item
