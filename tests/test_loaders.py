"Several datasets as one, and batches that are a function of (seed, step)"
import pickle, random, shutil, warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import cv2, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from test_stats import city, data, gta, write
from udanb import datasets
from udanb.catalog import GTA
from udanb.datasets import SegFolder
from udanb.labels import CAMVID11, CITYSCAPES19, CITYSCAPES_IDS
from udanb.loaders import SegConcat, draw_image, eval_loader, pair_loader
from udanb.stats import RareClassSampler, class_stats
from udanb.transforms import AUGMENT, EvalTfm, TrainTfm

def kit(root, **kw):
    return dict(src=gta(root), tgt=city(root, labels=False), src_tfm=TrainTfm(None, (24,24), cat_max=.75), tgt_tfm=TrainTfm(None, (24,24), margins=(2,6,1,1)),
                batch=2, seed=3) | kw

def same(a, b):
    for x,y in zip(a, b, strict=True):
        assert (x is None)==(y is None)
        if x is None: continue
        assert x.name==y.name and x.img.equal(y.img)
        for k in ('lbl','wgt'):
            p,q = getattr(x,k),getattr(y,k)
            assert p is q is None or p.equal(q)

# ---------------------------------------------------------------- batches

@pytest.fixture
def rcs(data): return RareClassSampler(class_stats(gta(data), quiet=True), 19, min_px=50, names=CITYSCAPES19.classes)

@pytest.mark.filterwarnings('ignore:rare-class')
@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize('workers', [1,3])
def test_workers_and_resume_do_not_change_batches(data, rcs, workers):
    kw = kit(data, rcs=rcs, min_crop_px=30)
    here = list(pair_loader(**kw, steps=9))
    there = list(pair_loader(**kw, steps=9, workers=workers))
    late = list(pair_loader(**kw, start=5, steps=9, workers=workers))
    assert len(here)==len(there)==9 and len(late)==4
    for a,b in zip(here, there, strict=True): same(a, b)
    for a,b in zip(here[5:], late, strict=True): same(a, b)

@pytest.mark.filterwarnings('ignore:rare-class')
def test_batches_depend_on_nothing_but_seed_and_step(data, rcs):
    kw = kit(data, rcs=rcs)
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    states = torch.get_rng_state(),np.random.get_state()[1].copy(),random.getstate()
    a = list(pair_loader(**kw, steps=3))
    assert torch.get_rng_state().equal(states[0]) and (np.random.get_state()[1]==states[1]).all() and random.getstate()==states[2]
    torch.manual_seed(1); np.random.seed(7); random.seed(7)
    for x,y in zip(a, pair_loader(**kw, steps=3), strict=True): same(x, y)
    b = next(iter(pair_loader(**kw | dict(seed=4))))
    assert not b.src.img.equal(a[0].src.img) and not a[1].src.img.equal(a[0].src.img)
    assert next(iter(pair_loader(**kw | dict(seed=-1)))).src.img.shape==(2,3,24,24)

@pytest.mark.filterwarnings('ignore:rare-class')
def test_target_does_not_depend_on_the_source(data, rcs):
    a = [list(pair_loader(**kit(data, rcs=r), steps=3)) for r in (None, rcs)]
    for x,y in zip(*a): same([x.tgt], [y.tgt])
    alone = list(pair_loader(**kit(data, tgt=None), steps=3))
    for x,y in zip(a[0], alone): same([x.src,None], y)

def test_target_labels_are_never_touched(data):
    f = city(data, labels=False)
    f.label = f.label_path = lambda i: pytest.fail('a target label was read')
    src,tgt = next(iter(pair_loader(**kit(data, tgt=f))))
    assert tgt.lbl is None and tgt.wgt.shape==(2,24,24) and src.wgt is None and src.lbl.dtype==torch.int64

def test_margins_reach_the_weight(data):
    seen = [b.tgt.wgt for b in pair_loader(**kit(data), steps=40)]
    assert {float(v) for w in seen for v in w.unique()}=={0.,1.}
    bottom = torch.cat(seen)[:,-6:]
    assert .05<(bottom==0).float().mean()<1

def test_both_domains_are_drawn_uniformly(data):
    names = [n for b in pair_loader(**kit(data), steps=150) for n in b.src.name]
    n = np.unique(names, return_counts=True)[1]
    assert len(n)==10 and n.min()>12 and n.max()<50                        # 300 draws of 10

@pytest.mark.filterwarnings('ignore:rare-class')
def test_crops_hold_the_class_they_were_drawn_for(data, rcs):
    class Told:                                                            # remembers what was asked
        def __init__(self): self.asked = []
        def draw(self, rng): self.asked.append(rcs.draw(rng)); return self.asked[-1]
    told = Told()
    def held(min_px):
        told.asked.clear()
        bs = list(pair_loader(**kit(data, rcs=told, min_crop_px=min_px), steps=40))
        assert [gta(data).names[i] for i,_ in told.asked]==[n for b in bs for n in b.src.name]
        return np.mean([(b.src.lbl[j]==told.asked[2*i+j][1]).sum()>40 for i,b in enumerate(bs) for j in range(2)])
    assert held(40)>held(-1)+.2

def test_endless_and_empty(data):
    it = iter(pair_loader(**kit(data)))
    for _ in range(3): next(it)
    assert len(list(pair_loader(**kit(data), start=4, steps=4)))==0

IMG,LBL,TGT = 'gta/images/00000.png','gta/labels/00000.png','cityscapes/leftImg8bit/train/aachen/x_leftImg8bit.png'
@pytest.mark.parametrize('which,workers', [(IMG,0),(LBL,0),(TGT,0),(LBL,1)])   # torch takes 5 s to clear a failed worker away: only one
def test_errors_name_step_and_file(data, workers, which):
    kw = kit(data)
    (data/which).write_bytes((data/which).read_bytes()[:80])
    kw['src'].names = kw['src'].names[:1]; kw['tgt'].names = kw['tgt'].names[:1]
    with pytest.raises(ValueError, match=rf'step 7, .*\n?.*{Path(which).name}'): list(pair_loader(**kw, start=7, steps=8, workers=workers))

def test_other_failures_keep_their_kind_in_the_message(data):
    class Odd(TrainTfm):
        def __call__(self, *a): raise KeyError('odd')
    with pytest.raises(RuntimeError, match='step 0, images/.*KeyError'): next(iter(pair_loader(**kit(data, src_tfm=Odd(None, (8,8))))))

def test_workers_use_one_thread(data):
    class Threads(TrainTfm):
        def __call__(self, *a):
            if (t := (torch.get_num_threads(), cv2.getNumThreads()))!=(1,1): raise ValueError(f'threads {t}')
            return super().__call__(*a)
    before = cv2.getNumThreads()
    list(pair_loader(**kit(data, src_tfm=Threads(None, (8,8))), steps=2, workers=2))
    assert cv2.getNumThreads()==before

def test_everything_pickles(data):
    "Spawned workers (macOS, Windows) get their dataset by pickle"
    ds = pair_loader(**kit(data)).dataset
    same(pickle.loads(pickle.dumps(ds))[2], ds[2])

def test_eval_loader(data):
    f = city(data, 'val')
    for workers in (0,2):
        items = list(eval_loader(f, EvalTfm((20,30)), workers))
        assert [x.name for x,_ in items]==[(n,) for n in f.names]
        assert all(x.img.shape==(1,3,20,30) and l.shape==(40,60) and (l.numpy()==f.label(i)).all() for i,(x,l) in enumerate(items))
