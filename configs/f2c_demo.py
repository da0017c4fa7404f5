"""Demo for the built-in trainer: trains and verifies a model on synthetic faces in minutes, on two CPU cores.

    f2c-plugin synth data/f2c_demo --identities 800 --images-per-identity 20 --pairs 2000
    python -m f2c_plugin.train f2c_demo
"""

from easydict import EasyDict as edict

config = edict()
config.head = "f2c_dcp"
config.f2c_pool_rate = 0.25  # 200 slots: more than the 128 identities that a batch may hold
config.margin_list = (1.0, 0.0, 0.35)
config.scale = 32.0  # 64 is too large for 800 identities
config.network = "small"
config.embedding_size = 128
config.batch_size = 128
config.lr = 0.1
config.weight_decay = 5e-4
config.num_workers = 0  # decoding 128 small JPEGs takes only 2 % of a step
config.num_epoch = 2
config.frequent = 10
config.verbose = 50

config.rec = "data/f2c_demo"
config.num_classes = 800
config.num_image = 16000
config.val_targets = ["synth"]
