"""PPO, SAC (target networks through .data), TD3 and DQN"""

import warnings

from stable_baselines3 import DQN, PPO, SAC, TD3

REQUIRES = ("stable-baselines3",)


def train():
    warnings.filterwarnings("ignore")
    replay = {"learning_starts": 32, "batch_size": 16, "buffer_size": 200}
    agents = (
        (PPO, "CartPole-v1", {"n_steps": 64, "batch_size": 32, "n_epochs": 2}),
        (DQN, "CartPole-v1", {"target_update_interval": 20, **replay}),
        (SAC, "Pendulum-v1", replay),
        (TD3, "Pendulum-v1", replay),
    )
    trained = []
    for kind, world, given in agents:
        agent = kind("MlpPolicy", world, seed=0, device="cpu", policy_kwargs={"net_arch": [16]}, **given)
        agent.learn(128)
        trained += agent.policy.state_dict().values()
    return trained
