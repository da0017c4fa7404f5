"""WebFace42M, ResNet-50, one GPU of 12 GB: what Partial FC cannot hold there."""

from easydict import EasyDict as edict

config = edict()
config.head = "f2c_dcp"
config.f2c_pool_rate = 0.01  # 20,599 slots, two rows of 512 floats each: 84 MB instead of 4.2 GB of weights alone
config.f2c_momentum = 0.99
config.margin_list = (1.0, 0.0, 0.4)  # CosFace, as in the host's WebFace42M configs
config.network = "r50"
config.resume = False
config.save_all_states = True  # one GPU needs weeks
config.output = None
config.embedding_size = 512
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 128  # the activations of r50, and of the gallery net's forward pass, beside the pool
config.lr = 0.02  # the host's for 128 images a step, ms1mv3_r50_onegpu
config.verbose = 10000
config.dali = False
config.num_workers = 4

config.rec = "/train_tmp/WebFace42M"
config.num_classes = 2059906
config.num_image = 42474557
config.num_epoch = 20
config.warmup_epoch = 0
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
