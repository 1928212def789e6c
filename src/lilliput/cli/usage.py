"""What each command says of itself."""

RUN = """usage: lilliput run [-m] [--config FILE] [--dry] [--count published] [--check] [--cfg] [--plain]
                    [key=value ...]

Trains one model on clients that keep their data.  Settings are written key=value or --key value; each has a default,
so that `lilliput run` alone works.  What a single method, model, data set, ... has of its own stands under its name,
and `partition.alpha` is `alpha` of the partition chosen; `lilliput run --help NAME` shows what a name has.

  lilliput run algorithm=fedprox fedprox.mu=0.1 partition=dirichlet partition.alpha=0.3
  lilliput run dataset=cifar10 cifar10.folder=data/cifar10 model=resnet20 resnet20.norm=group clients=100 cohort=10
  lilliput run -m algorithm=fedavg,fedprox fedprox.mu=0.01,0.1 seed=0,1,2
  lilliput run -m seed=0,1,2,3 hydra/launcher=joblib hydra.launcher.n_jobs=2
  lilliput run algorithm=mine.py:MyMethod my_method.mu=0.5

flags
  -m             a sweep: every combination of comma-separated values; typed again, only what is missing
  --config FILE  settings from a YAML file, below those that are typed; a run's config.yaml repeats it
  --dry          tell bytes by kind, memory and FLOPs of every client beforehand, and train nothing (engine=dry too)
  --count published   with --dry: bytes as the methods' papers count them, without labels
  --check        of a recipe: compare with what was published (reproduced, same ordering, not reproduced, not run)
  --cfg          print the settings and stop
  --plain        a line per round instead of the live table

{settings}

Names of methods, models, data sets, ...: `lilliput list`.  Case, - and _ in names do not matter.  The keys of the
published programs work too: num_clients, comm_round, client_sample_ratio, partition_alpha, dataset.distribution, ..."""

MEMORY = """usage: lilliput memory [--figure FILE] [key=value ...]

What a training step needs, beside other ways to train the model: weights, gradients, optimizer state, projections and
activations, each at its largest, their total, and the peak, which is less: not all are there at the same time.  The
bars show the peak.  Nothing of the model's size is allocated.

  lilliput memory model=llama_7b optimizer=galore_adamw8bit rank=1024 dtype=bf16 batch_size=1 gpu=24GB
  lilliput memory model=resnet18 optimizer=sgd batch_size=32 shape=[3,32,32] classes=100 device=cpu

flags
  --figure FILE  draw the stacked bars into FILE.pdf and FILE.png

settings, as of `lilliput pretrain`
{settings}
  gpu=null              what there is: 24GB, 16GiB; says whether it fits, or which option would make it fit
  certify=true          run the step on tensors without numbers, which is exact; false takes formulas

Short: batch, length, rank.  The keys of the published training script work too."""

RESUME = """usage: lilliput resume FOLDER [FOLDER ...] [key=value ...] [--plain]

Continues the run in a folder from its last checkpoint; it ends with the same bits as a run that was not interrupted.
A folder above several runs stands for those of them that are not finished.  Settings change how it goes on: where it
runs (engine=workers), how long (rounds=100), when it stops (target=0.9).

  lilliput resume runs/fedavg/mlp/digits-iid/2026-01-31_12-00-00
  lilliput resume runs/                    every interrupted run
  lilliput resume runs/my-run rounds=100   a finished run, longer"""

EVALUATE = """usage: lilliput evaluate [FOLDER] [--best] [--generate [--beams=4 ...]] [key=value ...]

Scores the model of a run's last checkpoint (or of its best round, --best) on the run's test set, or on another one.
Without a folder: a model by name with weights from a file.

  lilliput evaluate runs/my-run
  lilliput evaluate runs/my-run --best dataset=cifar10 cifar10.folder=data/cifar10
  lilliput evaluate model=resnet20 dataset=cifar10 cifar10.folder=data/cifar10 init=resnet20-12fca82f.th

--generate lets a language model answer each prompt of the test set, and scores the texts: BLEU, NIST, METEOR, ROUGE-L.
  --beams=1             beams of the search; 1 is greedy
  --new-tokens=64       tokens of an answer at most
  --length-penalty=1.0  above 0 favours longer texts, with more than one beam
  --no-repeat=0         n-grams of this length occur once in a text
  --batch-size=16       prompts at a time
  --first=N             only the first N prompts
  --out=FILE            write the texts beside their references, as lines of JSON"""

LIST = """usage: lilliput list [KIND ...] [--markdown]

KIND is one or more of: {kinds}; all of them by default.
`lilliput run --help NAME` shows what can be set for a name.  --markdown prints the recipes as docs/reproduction.md."""

NEW = """usage: lilliput new method NAME [--folder FOLDER]

Writes NAME.py, a method that runs as it is and is yours to change, and test_NAME.py, the laws that every method obeys.

  lilliput new method MyMethod
  lilliput run algorithm=my_method.py:MyMethod my_method.beta=0.9
  pytest test_my_method.py"""

DOCTOR = """usage: lilliput doctor

Versions, optional extras and the pip line for those that are missing, devices, cores, memory, disk, and how worker
processes are started here."""
