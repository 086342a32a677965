"""One small LeRobot data set and one small network, shared by the tests of data, policy and train.

The data set is written once a session, through LeRobot's own API: three episodes of two tasks, a video camera of 64 x 48 and a
camera whose pictures lie in the parquet files.
"""

from pathlib import Path

import numpy as np
import pytest

from pi0fm import options
from pi0fm.models.config import Pi0Config, preset

FPS = 10
LENGTHS = (12, 9, 7)
PROMPTS = ("press the button", "open_the drawer ", "press the button")
STATE_DIM, ACTION_DIM = 4, 3
REPO_ID = "local/tiny"

# Width 32 and 1 layer of vision: a step takes milliseconds.
NETWORK = {
    "preset": "tiny",
    "vision": {"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 32, "patch_size": 16, "image_size": 32},
    "decoder": {
        "backbone": {"width": 32, "mlp_width": 48},
        "action_expert": {"width": 32, "mlp_width": 48},
        "depth": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
    },
    "max_prompt_tokens": 24,
    "action_dim": 5,
    "state_dim": 6,
    "action_horizon": 4,
}


def network() -> Pi0Config:
    """NETWORK as the configuration that it stands for."""
    tree = {name: value for name, value in NETWORK.items() if name != "preset"}
    return options.decode(Pi0Config, options.merge(options.encode(preset(str(NETWORK["preset"]))), tree))


def written(factory: pytest.TempPathFactory) -> Path:
    """The folder of the data set, written at the first call; copy it before changing it."""
    root = factory.getbasetemp() / "tiny"
    return root if root.exists() else write(root)


def write(root: Path) -> Path:
    import av
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    av.logging.set_libav_level(av.logging.ERROR)
    features = {
        "observation.state": {"dtype": "float32", "shape": (STATE_DIM,), "names": None},
        "action": {"dtype": "float32", "shape": (ACTION_DIM,), "names": None},
        "seed": {"dtype": "int64", "shape": (1,), "names": None},
        "observation.images.base": {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
        "observation.images.wrist": {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]},
    }
    codec = RGBEncoderConfig(vcodec="h264", pix_fmt="yuv420p", g=4, crf=18, preset="veryfast")
    how = {"streaming_encoding": True, "encoder_queue_maxsize": 64, "encoder_threads": 1, "rgb_encoder": codec, "video_backend": "pyav"}
    data = LeRobotDataset.create(REPO_ID, fps=FPS, features=features, root=root, robot_type="toy", **how)
    random = np.random.default_rng(0)
    for episode, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        for row in range(length):
            blocks = np.kron(random.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))
            data.add_frame(
                {
                    "observation.state": random.normal(size=STATE_DIM).astype(np.float32),
                    "action": np.array([episode, row, random.normal()], dtype=np.float32),
                    "seed": np.array([100 + episode], dtype=np.int64),
                    "observation.images.base": blocks,
                    "observation.images.wrist": random.integers(0, 256, (32, 32, 3), dtype=np.uint8),
                    "task": prompt,
                }
            )
        data.save_episode(parallel_encoding=False)
    data.finalize()
    return root
