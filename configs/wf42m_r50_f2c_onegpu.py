"""WebFace42M, ResNet-50, one GPU with 12 GB, which is too little for Partial FC."""

from easydict import EasyDict as edict

config = edict()
config.head = "f2c_dcp"
config.f2c_pool_rate = 0.01  # 20,599 slots of 512 floats: 42 MB; all class weights take 4.2 GB, of main memory
config.margin_list = (1.0, 0.0, 0.4)  # CosFace, as in arcface_torch's WebFace42M configs
config.network = "r50"
config.resume = False
config.save_all_states = True  # the run takes weeks and must be resumable
config.output = None
config.embedding_size = 512
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 128
config.lr = 0.02  # as in arcface_torch's ms1mv3_r50_onegpu, with 128 images per step
config.verbose = 10000
config.dali = False
config.num_workers = 4

config.rec = "/train_tmp/WebFace42M"
config.num_classes = 2059906
config.num_image = 42474557
config.num_epoch = 20
config.warmup_epoch = 0
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
