"""PPO with a penalty on the divergence from the last policy, whose weight adapts in forward"""

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import KLPENPPOLoss

REQUIRES = ("torchrl",)
CORRUPTS = True
ALARM = (
    "True. `forward` multiplies the divergence by `beta`, which autograd saves for the gradient of the divergence, and "
    "then adapts `beta` for the next step by `self.beta.data *= ...`. This step's backward reads the new one: whenever "
    "it adapts, the gradient of the penalty is off by that factor. In the [gallery](gallery.md)."
)


def train():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    value = ValueOperator(nn.Linear(4, 1), in_keys=["observation"])
    loss = KLPENPPOLoss(actor, value, beta=1.0, dtarg=0.01)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            batch = actor(TensorDict({"observation": torch.randn(16, 4)}, 16))
        seen = {"observation": torch.randn(16, 4), "reward": torch.randn(16, 1)}
        seen |= {name: torch.zeros(16, 1, dtype=torch.bool) for name in ("done", "terminated")}
        batch["next"] = TensorDict(seen, 16)
        for _ in range(3):
            terms = loss(batch)
            optimizer.zero_grad()
            sum(term for name, term in terms.items() if name.startswith("loss_")).backward()
            optimizer.step()
    return [tensor for tensor in loss.state_dict().values() if isinstance(tensor, torch.Tensor)]
