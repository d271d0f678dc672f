"""Accelerated models among everything else that people do to a model: compile, autocast, hooks, wrappers, adapters.

Order: `accelerate` first, the rest after it. What is checked: the result is that of the same model without `accelerate`
(tolerance policy, truth in fp64), the other party's code still runs, and both can be taken back.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import FirstBlockCacheConfig
from torch import nn
from torch._dynamo.utils import counters

import fastdit
from fastdit.testing import close, zoo
from fastdit.testing.accelerated import check_autocast
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.models import diffusers_wan

NAMES = ("DiTTransformer2DModel", "WanTransformer3DModel")
each_model = pytest.mark.parametrize("name", NAMES, ids=("dit", "wan"))
BF16 = torch.bfloat16


def entry_of(name):
    return next(entry for entry in zoo.models() if str(entry) == name)


def run(entry, model, dtype=torch.float32, **changed):
    return entry.call(model, {**entry.given(dtype), **changed})


def truth_of(entry, model, **changed):
    with no_rounding():
        return run(entry, exact(model), torch.float64, **changed)


def judge(entry, model, plain, dtype=torch.float32):
    """The accelerated model against the plain one over the same weights, both as they now are."""
    return close.assert_close(run(entry, model, dtype), truth_of(entry, plain), run(entry, plain, dtype))


def blocks(model):
    return model.blocks if hasattr(model, "blocks") else model.transformer_blocks


# torch.compile, autocast, batches -----------------------------------------------------------------------------------


@torch.no_grad()
def test_repeated_blocks_compile_once():
    """Ten blocks, three lengths: one graph for the first block, whose input is a view, and one for all the others."""
    counters.clear()
    model = diffusers_wan(num_layers=10)
    fastdit.accelerate(model)
    eager = copy.deepcopy(model)
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    for grid, stance in (((3, 4, 5), "default"), ((5, 4, 7), "fail_on_recompile"), ((7, 6, 3), "fail_on_recompile")):
        given = wan_inputs(grid)
        with torch.compiler.set_stance(stance):
            compiled = model(**given)[0]
        close.assert_bitwise(compiled, eager(**given)[0])
    assert counters["stats"]["unique_graphs"] <= 2


@torch.no_grad()
def test_dit_blocks_compile_once():
    counters.clear()
    entry = entry_of(NAMES[0])
    model = entry.build()
    fastdit.accelerate(model)
    eager = copy.deepcopy(model)
    steps = dict(timestep=torch.tensor([3, 987]), class_labels=torch.tensor([1, 999]))
    for block in blocks(model):
        block.compile(fullgraph=True, dynamic=True, backend="eager")
    for tokens, stance in ((12, "default"), (35, "fail_on_recompile"), (48, "fail_on_recompile")):
        x = torch.randn(2, tokens, 64)
        with torch.compiler.set_stance(stance):
            compiled = blocks(model)[1](blocks(model)[0](x, **steps), **steps)
        close.assert_bitwise(compiled, blocks(eager)[1](blocks(eager)[0](x, **steps), **steps))
    assert counters["stats"]["unique_graphs"] == 1


def wan_inputs(grid):
    t, h, w = grid
    video, text = zoo.randn(2, 4, t, 2 * h, 2 * w), zoo.randn(2, 9, 32)
    return dict(hidden_states=video, timestep=torch.tensor([3.0, 987.0]), encoder_hidden_states=text, return_dict=False)


@each_model
@torch.no_grad()
def test_autocast(name):
    entry = entry_of(name)
    model = entry.build()
    truth = truth_of(entry, model)
    check_autocast(model, lambda m: run(entry, m), truth)


@each_model
@torch.no_grad()
def test_guidance_in_one_batch(name):
    """Conditional and unconditional rows side by side are what each is alone."""
    entry = entry_of(name)
    model = entry.build()
    given = entry.given(torch.float32)
    truth = truth_of(entry, model)
    alone = [{k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in given.items()} for i in range(2)]
    before = torch.cat([entry.call(model, one) for one in alone])
    fastdit.accelerate(model)
    close.assert_close(run(entry, model), truth, before)
    close.assert_close(torch.cat([entry.call(model, one) for one in alone]), truth, before)


# Hooks of diffusers and accelerate ----------------------------------------------------------------------------------


@each_model
@torch.no_grad()
def test_layerwise_casting(name):
    """Weights stored in fp8, computed in bf16: norms and tables that the ops read are not cast, the rest is called."""
    entry = entry_of(name)
    plain = entry.build().to(BF16)
    model = copy.deepcopy(plain)
    fastdit.accelerate(model)
    for m in (plain, model):
        m.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)
    stored = {n: p for n, p in plain.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert len(stored) > 10
    rounded = entry.build().to(BF16)
    for n, p in rounded.named_parameters():
        p.copy_(stored[n].to(BF16) if n in stored else p)
    close.assert_close(run(entry, model, BF16), truth_of(entry, rounded), run(entry, plain, BF16))
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn} == stored.keys()


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@torch.no_grad()
def test_group_offload(level, tmp_path):
    """To disk, so that a weight that is not there when it is used is noticed; a norm's comes by a hook on the norm."""
    entry, cpu = entry_of(NAMES[1]), torch.device("cpu")
    plain, model = entry.build(), entry.build()
    fastdit.accelerate(model)
    options = dict(num_blocks_per_group=1) if level == "block_level" else {}
    model.enable_group_offload(cpu, cpu, offload_type=level, offload_to_disk_path=str(tmp_path), **options)
    for _ in range(2):
        judge(entry, model, plain)


@each_model
@torch.no_grad()
def test_sequential_offload(name):
    """accelerate's hook on every module: weights are on "meta" but while their module is called."""
    accelerate = pytest.importorskip("accelerate")
    entry = entry_of(name)
    plain, model = entry.build(), entry.build()
    fastdit.accelerate(model)
    accelerate.cpu_offload(model, "cpu")
    assert next(blocks(model).parameters()).device.type == "meta"
    for _ in range(2):
        judge(entry, model, plain)
    accelerate.hooks.remove_hook_from_submodules(model)
    fastdit.restore(model)
    close.assert_bitwise(run(entry, model), run(entry, plain))


@each_model
@torch.no_grad()
def test_model_cpu_offload(name):
    """The hook that `enable_model_cpu_offload` puts on each component of a pipeline."""
    accelerate = pytest.importorskip("accelerate")
    entry = entry_of(name)
    plain = entry.build()
    model = copy.deepcopy(plain)
    fastdit.accelerate(model)
    _, hook = accelerate.cpu_offload_with_hook(model, "cpu")
    judge(entry, model, plain)
    hook.offload()
    judge(entry, model, plain)
    hook.remove()
    fastdit.restore(model)
    close.assert_bitwise(run(entry, model), run(entry, plain))


@torch.no_grad()
def test_first_block_cache():
    """Its hooks wrap the blocks' forwards; a step that resembles the last one skips the blocks after the first."""
    entry = entry_of(NAMES[1])
    plain, model = entry.build(), entry.build()
    double, later = exact(plain), torch.tensor([5.0, 900.0])
    fastdit.accelerate(model)
    alone, unskipped = run(entry, model), run(entry, model, timestep=later)

    def two_steps(model, dtype):
        model.enable_cache(FirstBlockCacheConfig(threshold=1e3))
        with model.cache_context("cond"):
            return run(entry, model, dtype), run(entry, model, dtype, timestep=later)

    with no_rounding():
        truth = two_steps(double, torch.float64)
    after, before = two_steps(model, torch.float32), two_steps(plain, torch.float32)
    for step in range(2):
        close.assert_close(after[step], truth[step], before[step])
    close.assert_bitwise(after[0], alone)
    assert not torch.equal(after[1], unskipped)
    with pytest.raises(RuntimeError, match="remove the hooks"):
        fastdit.restore(model)
    for m in (model, plain):
        m.disable_cache()
    close.assert_bitwise(run(entry, model), alone)
    fastdit.restore(model)
    close.assert_bitwise(run(entry, model), run(entry, plain))


# Adapters and packed weights ----------------------------------------------------------------------------------------


@each_model
def test_lora(name):
    """peft's adapters, added to the accelerated model and to the plain one: outputs, and gradients of the adapters."""
    peft = pytest.importorskip("peft")
    entry = entry_of(name)
    plain = entry.build()
    model = copy.deepcopy(plain)
    fastdit.accelerate(model)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "norm1.linear"]
    for m in (plain, model):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False), m)
    double = exact(plain)
    with no_rounding():
        results = [run(entry, m, d) for m, d in ((double, torch.float64), (plain, torch.float32))]
    results.insert(0, run(entry, model))
    grads = []
    for m, output in zip((model, double, plain), results, strict=True):
        output.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in m.named_parameters() if "lora" in n]))
    close.assert_close(*(r.detach() for r in results))
    close.assert_close(*grads)
    fastdit.restore(model)
    close.assert_bitwise(run(entry, model), run(entry, plain))


class Packed(nn.Module):
    """A linear layer as torchao, bitsandbytes and GGUF store it: whoever reads its weight gets none."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.codes = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self):
        raise RuntimeError("a packed weight was read")

    bias = weight

    def forward(self, x):
        return F.linear(x.to(self.scale.dtype), self.codes * self.scale, self.offset)


def pack(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Packed(child))
    return model


@each_model
@pytest.mark.parametrize("first", ["packed", "accelerated"])
@torch.no_grad()
def test_packed_weights(name, first):
    """Linear layers are called, never read, whether they were packed before `accelerate` or after it."""
    entry = entry_of(name)
    plain, model = pack(entry.build()), entry.build()
    if first == "packed":
        pack(model)
    report = fastdit.accelerate(model)
    assert {row.layer for row in report.rows if row.replaced} == entry.layers.keys()
    if first == "accelerated":
        pack(model)
    judge(entry, model, plain)


# Copies and files ---------------------------------------------------------------------------------------------------


@each_model
@torch.no_grad()
def test_copies_and_files(name, tmp_path):
    entry = entry_of(name)
    model = entry.build()
    before = run(entry, model)
    fastdit.accelerate(model)
    after = run(entry, model)
    clone = copy.deepcopy(model)
    close.assert_bitwise(run(entry, clone), after)
    fastdit.restore(clone)
    close.assert_bitwise(run(entry, clone), before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    close.assert_bitwise(run(entry, loaded), before)
    fastdit.accelerate(loaded)
    close.assert_bitwise(run(entry, loaded), after)


# Several processes --------------------------------------------------------------------------------------------------


def worker(rank, ranks, file):
    """One rank: the gradients of the wrapped accelerated model against those of the plain one on all ranks' inputs."""
    from torch import distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    for entry in map(entry_of, NAMES):
        plain = entry.build()
        shape = entry.inputs()["hidden_states"].shape
        given = [{"hidden_states": zoo.randn(*shape, seed=r)} for r in range(ranks)]
        with no_rounding():
            truth = averaged_gradients(entry, exact(plain), given, torch.float64)
        before = averaged_gradients(entry, plain, given, torch.float32)
        scales = {n: g.square().mean().sqrt() for n, g in truth.items() if g.any()}
        for wrapper in (nn.parallel.DistributedDataParallel, fully_sharded):
            model = copy.deepcopy(plain)
            fastdit.accelerate(model)
            wrapped = wrapper(model)
            wrapped.zero_grad()
            run(entry, wrapped, **given[rank]).square().mean().backward()
            named = [(n.removeprefix("module."), p.grad) for n, p in wrapped.named_parameters()]
            found = {n: whole(grad) for n, grad in named if grad is not None}
            assert found.keys() == before.keys()
            pooled = (
                torch.cat([(g[n].double() / s).flatten() for n, s in scales.items()]) for g in (found, truth, before)
            )
            close.assert_close(*pooled, f"{entry} in {wrapper.__name__}")
    dist.destroy_process_group()


def averaged_gradients(entry, model, given, dtype):
    for one in given:
        changed = {k: v.to(dtype) for k, v in one.items()}
        (run(entry, model, dtype, **changed).square().mean() / len(given)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def whole(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def fully_sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=False)  # DiT's forward reads into its first block
    return fully_shard(model, mesh=mesh)


def test_several_processes(tmp_path):
    """DistributedDataParallel and FSDP2 around accelerated models, two processes."""
    torch.multiprocessing.spawn(worker, (2, tmp_path / "rendezvous"), nprocs=2)
