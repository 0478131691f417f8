"""A whole run, in order: check everything that can be checked on the CPU, then take the device and train."""

from contextlib import closing, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from training import estimate, preflight, state
from training.assemble import Data, build_optimizer, on_rank_0, open_data, open_model
from training.config import BATCH_SIZE, CONFIG_FILE, TrainConfig
from training.data.loading import loader_deaths_named, make_loader, read_data_config
from training.data.sampler import RankBatches
from training.generation.sheet import Sheet, open_sheet
from training.loop import Run, train
from training.models.folder import FINAL, TRAINED_WITH, ModelFolder, save_folder
from training.models.units import LayeredModel, compile_unit
from training.parallel import gather, process_group, shard
from training.report import Flops, Report
from training.state import Progress
from vistoken.device import float32_products
from vistoken.errors import UserError
from vistoken.store import location

ROOM = 0.8  # share of a GPU's memory that may be planned for


def run(config: TrainConfig, world: int, local_rank: int) -> None:
    """Train as `config` says, from the newest checkpoint if there is one, and save the model."""
    samples, batches = config.shares(world)
    sources = read_data_config(location(config.data_config))
    checkpoint = starting_point(config)
    model, folder = open_model(config, resumed=checkpoint is not None)
    with process_group() as device, float32_products(tf32=config.precision != "fp32"):
        data = open_data(config, sources, folder, world * batches * samples, local_rank)
        sheet = open_sheet(config, folder, data)
        settled = fixed(config, data)
        progress = state.read_progress(checkpoint, settled) if checkpoint else Progress()
        whole = on_rank_0(lambda: begin_output(config, data, sheet, folder, model, device, checkpoint))
        flops = Flops(model, folder.llm, folder.vision)

        reshard, over = config.data_parallel == "fsdp", config.shard_over
        shard(model, device, config.precision, reshard=reshard, over=over, filled=checkpoint is None)
        for unit in model.units() if config.compile else ():
            compile_unit(unit)
        optimizer = build_optimizer(model, config, device)
        if checkpoint:
            state.load(checkpoint, model, optimizer)
            if dist.get_rank() == 0:
                write_config(config)
                changed = state.changed(checkpoint, config)
                print(f"going on from {checkpoint}" + (f"; changed since: {changed}" if changed else ""), flush=True)
        order = RankBatches(
            data.sampler,
            config.epochs,
            batches,
            dist.get_rank(),
            world,
            position=(progress.epoch, progress.epoch_step),
            condition_dropout=config.condition_dropout,
            budget=config.batch_tokens,
            limit=config.max_seq_len,
        )
        job = Run(
            config=config,
            model=model,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(device.type, progress.loss_scale, enabled=config.precision == "fp16"),
            loader=make_loader(data.dataset, order, config.num_workers, pin=device.type == "cuda"),
            order=order,
            epoch_steps=len(data.sampler),
            accumulation=batches,
            whole_gradients=whole,
            device=device,
            flops=flops,
            saver=state.Saver(config, settled),
            validation=data.validation,
            batch_size=min(samples, BATCH_SIZE) if config.batch_tokens else samples,
            sheet=sheet,
        )
        report = None
        if dist.get_rank() == 0:
            output, interval = Path(config.output_dir), config.log_interval
            report = Report(output, progress.step, job.total_steps, interval, world, config.precision)
        with closing(report) if report else nullcontext(), loader_deaths_named(data.dataset):
            train(job, progress, report)
        finish(config, model, folder)


def starting_point(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, if there is one."""
    found = state.checkpoints(Path(config.output_dir))
    if config.resume_path:
        return Path(config.resume_path)
    if found and not config.auto_resume:
        raise UserError(f"{found[-1]}: with --no_auto_resume, give an --output_dir without checkpoints")
    return found[-1] if found else None


def fixed(config: TrainConfig, data: Data) -> dict:
    """What cannot change between a checkpoint and what goes on from it."""
    return {
        "samples per step": data.sampler.step_size,
        "seed": config.seed,
        "variant": config.variant,
        "trainable_params": config.trainable_params,
        "data (fingerprint, ratio, type)": data.identity,
    }


def begin_output(
    config: TrainConfig,
    data: Data,
    sheet: Sheet | None,
    folder: ModelFolder,
    model: LayeredModel,
    device: torch.device,
    checkpoint: Path | None,
) -> bool:
    """Rank 0's preflight: can it be done, and what will happen, in print. Returns whether whole gradients are kept."""
    if find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed: pip install 'vistoken[train]'")
    if not checkpoint:  # the former run's configuration stays until it is clear that its checkpoint fits
        write_config(config)
    origins = dict.fromkeys(folder.origins, str(checkpoint)) if checkpoint else folder.origins
    world = dist.get_world_size()
    with_whole = estimate.memory(model, config, folder.llm, folder.vision, world, whole=True)
    whole = keeps_whole_gradients(config, with_whole.total, world, device)
    memory = with_whole if whole else replace(with_whole, whole_gradients=0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{world} process{'es' if world > 1 else ''} on {name}, PyTorch {torch.__version__}")
    print(preflight.parts_table(model, origins))
    print(preflight.memory_lines(memory, config, folder.vision, world))
    if sheet:
        print(preflight.sheet_line(sheet, config, folder.llm))
    print(preflight.data_lines(data))
    print(preflight.sample_text(data, folder), flush=True)
    return whole


def keeps_whole_gradients(config: TrainConfig, needed: float, world: int, device: torch.device) -> bool:
    """Whether gradients stay whole until a step's last batch, which takes `needed` bytes of memory in all."""
    several = config.batch_tokens or config.shares(world)[1] > 1
    if config.whole_gradients == "auto":
        if device.type != "cuda" or world == 1 or not several:
            return False
        return needed < ROOM * torch.cuda.get_device_properties(device).total_memory
    return config.whole_gradients == "yes"


def write_config(config: TrainConfig) -> None:
    output = Path(config.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        config.dump(output / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot write there ({error.strerror})") from error


def finish(config: TrainConfig, model: nn.Module, folder: ModelFolder) -> None:
    """Save the model as a folder that the next stage, or any other tool, starts from."""
    target = Path(config.output_dir) / FINAL
    tensors = gather(model)
    if dist.get_rank() == 0:
        total_bytes = sum(parameter.numel() for parameter in model.parameters()) * 4
        save_folder(target, tensors, total_bytes, folder.config | {TRAINED_WITH: config.told()}, folder.companions())
        print(f"the model is in {target}", flush=True)
    else:
        for _ in tensors:  # gathering takes every process
            pass
