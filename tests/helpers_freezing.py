"""What a frozen model must keep, written out by hand for the tiny models."""

import pytest
import torch
from torch import nn

from ssah_nb.engine.run import SsahError
from ssah_nb.units import UnitMask

LONG, SHORT = torch.arange(256).view(4, -1) % 250, torch.tensor([[5, 6, 7, 8]])


def half(seed: int = 0) -> UnitMask:
    """Half of the channels, and some heads.

    In layer 0 it is one head of a group; in layer 1 a whole group and a head of the other.
    """
    mlp = torch.rand(2, 32, generator=torch.Generator().manual_seed(seed)) < 0.5
    return UnitMask(mlp, torch.tensor([[True, False, False, False], [False, True, True, True]]))


def frozen_entries(architecture: str, mask: UnitMask) -> dict[str, torch.Tensor]:
    """{name of a weight: bool, which of its rows (A) or columns (B) belong to frozen units}.

    It is written out by hand for the tiny models.
    """
    found = {}
    for i in range(2):
        channels = mask.mlp[i]
        q = mask.attention[i].repeat_interleave(8)
        kv = mask.attention[i].view(2, 2).any(1).repeat_interleave(8)
        rows = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": kv,
            "self_attn.v_proj": kv,
            "mlp.gate_proj": channels,
            "mlp.up_proj": channels,
        }
        if architecture == "phi3":
            rows = {
                "self_attn.qkv_proj": torch.cat([q, kv, kv]),
                "mlp.gate_up_proj": torch.cat([channels, channels]),
            }
        found |= {f"model.layers.{i}.{name}.weight": r[:, None] for name, r in rows.items()}
        if architecture == "qwen2":
            found |= {
                f"model.layers.{i}.{name}.bias": r
                for name, r in rows.items()
                if "self_attn" in name
            }
        found |= {
            f"model.layers.{i}.self_attn.o_proj.weight": q[None],
            f"model.layers.{i}.mlp.down_proj.weight": channels[None],
        }
    return found


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_trained(
    after: dict, before: dict, mask: UnitMask, architecture: str = "llama", least: float = 0.9
):
    "Frozen bits are the same, and nearly all others are not."
    for name, frozen in frozen_entries(architecture, mask).items():
        frozen = frozen.expand_as(before[name])
        assert torch.equal(after[name][frozen], before[name][frozen]), name
        if name.endswith("weight") and not frozen.all():
            assert (after[name] != before[name])[~frozen].float().mean() > least, name


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **({"lr": 1e-2, "weight_decay": 0.1} | options))


def train(model, optimizer, steps=4, clip=None, autocast=False):
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ids = (LONG, SHORT)[step % 2]
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def refused(call, message: str, model: nn.Module):
    before = snapshot(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modules = list(model.modules())
    with pytest.raises(SsahError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert same(model.state_dict(), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


class Int8Linear(nn.Linear):
    "Stands in for a quantized linear."

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(
            (linear.weight.detach() * 50).to(torch.int8), requires_grad=False
        )

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 50)


def arguments(folder, **options):
    return (
        dict(
            output_dir=str(folder),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            save_strategy="no",
        )
        | options
    )


def lora(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            **({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
        ),
    )


PREFERENCES = [{"prompt": f"Say {i}", "chosen": f" {i}", "rejected": " no"} for i in range(16)]
