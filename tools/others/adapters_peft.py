"""Low-rank adapters of several kinds: trained, merged into the weights and taken out of them through .data"""

import torch
import torch.nn.functional as F
from others_data import batches, digits
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn

REQUIRES = ("peft", "scikit-learn")

KINDS = (
    lambda on: LoraConfig(r=4, target_modules=on, lora_dropout=0.1),
    lambda on: LoraConfig(r=4, target_modules=on, use_dora=True),
    lambda on: LoraConfig(r=4, target_modules=on, init_lora_weights="pissa"),
    lambda on: AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=8, target_modules=on),
    lambda on: LoHaConfig(r=4, target_modules=on),
    lambda on: OFTConfig(r=0, oft_block_size=8, target_modules=on, coft=True),
)


def train():
    images, labels = digits(64)
    trained = []
    for kind in KINDS:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))
        model = get_peft_model(net, kind(["0", "2"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step, (pixels, digit) in enumerate(batches()):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), digit).backward()
            optimizer.step()
            if hasattr(model.base_model, "update_and_allocate"):
                model.base_model.update_and_allocate(step)
            if step % 3 == 2:
                model.merge_adapter()
                trained.append(model(images).detach())
                model.unmerge_adapter()
        F.cross_entropy(model(images), labels).backward()
        trained += [*model.state_dict().values(), *model.merge_and_unload().state_dict().values()]
    return trained
