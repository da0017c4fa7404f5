"""WebFace42M, ResNet-100, 8 GPUs: replaces wf42m_pfc02_r100."""

from easydict import EasyDict as edict

config = edict()
config.head = "f2c_dcp"
config.f2c_pool_rate = 0.1  # 205,990 slots of 512 floats: 50 MB on each GPU; all class weights take 4.2 GB of main memory
config.margin_list = (1.0, 0.0, 0.4)  # CosFace, as in arcface_torch's WebFace42M configs
config.network = "r100"
config.resume = False
config.save_all_states = True  # the run takes days and must be resumable
config.output = None
config.embedding_size = 512
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 128  # 1,024 images per step on 8 GPUs; arcface_torch uses lr 0.1 for that
config.lr = 0.1
config.verbose = 10000
config.dali = False  # the dual loader decodes the images itself
config.num_workers = 8  # decoding must keep up with 8 GPUs

config.rec = "/train_tmp/WebFace42M"
config.num_classes = 2059906
config.num_image = 42474557
config.num_epoch = 20
config.warmup_epoch = 0
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
