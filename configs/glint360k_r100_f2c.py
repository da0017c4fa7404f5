"""Glint360K, ResNet-100, 8 GPUs: replaces glint360k_r100."""

from easydict import EasyDict as edict

config = edict()
config.head = "f2c_dcp"
config.f2c_pool_rate = 0.1  # 36,023 slots of 512 floats: 9 MB on each GPU; all class weights take 0.7 GB of main memory
config.margin_list = (1.0, 0.0, 0.4)  # CosFace, as in arcface_torch's Glint360K configs
config.network = "r100"
config.resume = False
config.save_all_states = True
config.output = None
config.embedding_size = 512
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 1e-4  # as in arcface_torch's Glint360K configs
config.batch_size = 128
config.lr = 0.1  # as in arcface_torch for 1,024 images per step
config.verbose = 2000
config.dali = False
config.num_workers = 8

config.rec = "/train_tmp/glint360k"
config.num_classes = 360232
config.num_image = 17091657
config.num_epoch = 20
config.warmup_epoch = 0
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
