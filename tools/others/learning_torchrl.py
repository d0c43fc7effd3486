"""SAC's loss (clamps its temperature through .data) with soft target updates"""

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

REQUIRES = ("torchrl",)


def train():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-1, 1, (2,)),
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    value = ValueOperator(Concatenated(), in_keys=["observation", "action"])
    loss = SACLoss(actor, value, action_spec=Bounded(-1, 1, (2,)), min_alpha=0.5, max_alpha=1.0)
    loss.make_value_estimator(gamma=0.9)
    targets = SoftUpdate(loss, eps=0.9)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(5):
        seen = {"observation": torch.randn(16, 4), "reward": torch.randn(16, 1)}
        seen |= {name: torch.zeros(16, 1, dtype=torch.bool) for name in ("done", "terminated")}
        batch = TensorDict({"observation": torch.randn(16, 4), "action": torch.rand(16, 2), "next": seen}, 16)
        terms = loss(batch)
        optimizer.zero_grad()
        sum(term for name, term in terms.items() if name.startswith("loss_")).backward()
        optimizer.step()
        targets.step()
    return [tensor for tensor in loss.state_dict().values() if isinstance(tensor, torch.Tensor)]


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, observation, action):
        return self.body(torch.cat([observation, action], -1))
