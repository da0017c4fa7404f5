"""MS1MV3, ResNet-50, 8 GPUs: replaces ms1mv3_r50. The fastest real run for comparing heads."""

from easydict import EasyDict as edict

config = edict()
config.head = "f2c_dcp"
config.f2c_pool_rate = 0.1  # 9,343 slots, 9 times the 1,024 images of a gathered batch
config.margin_list = (1.0, 0.5, 0.0)  # ArcFace, as in arcface_torch's MS1MV3 configs
config.network = "r50"
config.resume = False
config.output = None
config.embedding_size = 512
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 128
config.lr = 0.1  # as in arcface_torch for 1,024 images per step
config.verbose = 2000
config.dali = False
config.num_workers = 4

config.rec = "/train_tmp/ms1m-retinaface-t1"
config.num_classes = 93431
config.num_image = 5179510
config.num_epoch = 20
config.warmup_epoch = 0
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
