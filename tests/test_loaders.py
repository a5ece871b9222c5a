"Class statistics, rare-class sampling, and batches that are a function of (seed, step)"
import json, os, pickle, random, time, warnings
from pathlib import Path
import cv2, numpy as np, pytest, torch
from PIL import Image
from udanb import loaders
from udanb.datasets import DATASETS, SegFolder
from udanb.labels import CAMVID11, CAMVID_MERGE, CITYSCAPES19, CITYSCAPES_IDS
from udanb.loaders import (RareClassSampler, class_stats, count_label, count_labels, eval_loader, label_keys, native_ids, pair_loader,
                           rcs_px, stats_files)
from udanb.transforms import EvalTfm, TrainTfm

GOLDEN = Path(__file__).parent/'golden'
IDS = np.array(sorted(CITYSCAPES_IDS, key=CITYSCAPES_IDS.get), np.uint8)   # train id -> label id

def write(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)

@pytest.fixture
def data(tmp_path, monkeypatch):
    "GTA with 10 images; Cityscapes with two cities whose files have equal names, labels for val only"
    monkeypatch.chdir(tmp_path)                                            # caches go below the working directory, not into the project
    rng = np.random.default_rng(0)
    img = lambda: rng.integers(0, 256, (40,60,3), dtype=np.uint8)
    for i in range(10):
        lbl = rng.integers(0, 19, (4,6)).repeat(10,0).repeat(10,1)
        write(tmp_path/f'gta/images/{i:05d}.png', img())
        write(tmp_path/f'gta/labels/{i:05d}.png', np.where(lbl==8, 4, IDS[lbl]).astype(np.uint8))   # vegetation becomes a void id
    for s in ('train','val'):
        for k,city in enumerate(('aachen','bonn')):
            write(tmp_path/f'cityscapes/leftImg8bit/{s}/{city}/x_leftImg8bit.png', img())
            if s=='val': write(tmp_path/f'cityscapes/gtFine/{s}/{city}/x_gtFine_labelIds.png', np.full((40,60), IDS[k], np.uint8))
    return tmp_path

def gta(root, **kw): return SegFolder(DATASETS['gta'], root, **kw)
def city(root, split='train', **kw): return SegFolder(DATASETS['cityscapes'], root, split, **kw)

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

# ---------------------------------------------------------------- statistics

def counted(folder): return [(n, {c:int((folder.label(i)==c).sum()) for c in range(len(folder.space)) if (folder.label(i)==c).any()}) for i,n in enumerate(folder.names)]

@pytest.mark.parametrize('kw', [{}, dict(space=CAMVID11), dict(space=CAMVID11, merge=CAMVID_MERGE)])
def test_stats_equal_counting(data, kw):
    f = gta(data, **kw)
    assert class_stats(f, quiet=True)==class_stats(f, quiet=True)==class_stats(f, cache=False, quiet=True)==counted(f)

def test_the_file_has_upstreams_form_in_train_ids(data):
    class_stats(gta(data, space=CAMVID11, merge=CAMVID_MERGE), quiet=True)
    rows = json.loads((data/'gta/sample_class_stats.json').read_text())
    assert [r['file'] for r in rows]==[f'labels/{i:05d}.png' for i in range(10)]
    want = counted(gta(data))
    assert [{int(c):n for c,n in r.items() if c!='file'} for r in rows]==[n for _,n in want]

@pytest.mark.parametrize('prefix', ['data/gta/labels/', 'labels/', 'D:\\x\\gta\\labels\\'])
def test_upstreams_file_is_read(data, prefix, monkeypatch):
    rows = [{'0':100+i, '18':7, 'file':f'{prefix}{i:05d}_labelTrainIds.png'} for i in range(10)]
    (data/'gta/sample_class_stats.json').write_text(json.dumps(rows))
    monkeypatch.setattr(loaders, 'count_labels', lambda *a: pytest.fail('must not count'))
    assert class_stats(gta(data))==[(f'images/{i:05d}.png', {0:100+i, 18:7}) for i in range(10)]
    assert class_stats(gta(data, space=CAMVID11, merge=CAMVID_MERGE))[3][1]=={0:103, 10:7}

def test_equal_names_in_two_folders_do_not_meet(data):
    f = city(data, 'val')
    assert [n for _,n in class_stats(f, quiet=True)]==[{0:2400},{1:2400}]==[n for _,n in class_stats(f, quiet=True)]
    assert len(set(label_keys(f)))==2

def test_only_what_is_new_is_counted(data, monkeypatch):
    asked = []
    real = loaders.count_labels
    monkeypatch.setattr(loaders, 'count_labels', lambda f, idx, *a: asked.append(list(idx)) or real(f, idx, 0, True))
    class_stats(gta(data, limit=4)); class_stats(gta(data, limit=3)); class_stats(gta(data))
    assert asked==[[0,1,2,3],[4,5,6,7,8,9]]
    later = time.time()+100
    write(data/'gta/labels/00002.png', np.full((40,60), 7, np.uint8)); os.utime(data/'gta/labels/00002.png', (later,later))
    assert class_stats(gta(data))[2][1]=={0:2400} and asked[-1]==[2]
    (data/'gta/labels/00009.png').unlink(); (data/'gta/images/00009.png').unlink()
    assert len(class_stats(gta(data)))==9

def test_entries_of_other_files_survive(data):
    f = data/'gta/sample_class_stats.json'
    f.write_text(json.dumps([{'3':5, 'file':'elsewhere/labels/99999_labelTrainIds.png'}]))
    class_stats(gta(data), quiet=True)
    assert json.loads(f.read_text())[0]=={'3':5, 'file':'elsewhere/labels/99999_labelTrainIds.png'} and len(json.loads(f.read_text()))==11

def test_read_only_dataset_goes_to_the_cache(data, monkeypatch):
    real = loaders.atomic_write
    def write_(p, x):
        if p.parent==data/'gta': raise PermissionError(13, 'read-only')
        return real(p, x)
    monkeypatch.setattr(loaders, 'atomic_write', write_)
    a = class_stats(gta(data), quiet=True)
    assert not (data/'gta/sample_class_stats.json').exists() and stats_files(gta(data))[1].is_file()
    monkeypatch.setattr(loaders, 'count_labels', lambda *a: pytest.fail('must not count'))
    assert class_stats(gta(data))==a

def test_nowhere_to_write_only_warns(data, monkeypatch):
    def never(*a): raise OSError(30, 'read-only')
    monkeypatch.setattr(loaders, 'atomic_write', never)
    with pytest.warns(UserWarning, match='could not be kept'): a = class_stats(gta(data), quiet=True)
    assert a==counted(gta(data))

@pytest.mark.parametrize('text', ['[{"0": 1, "fi', '{"a": 1}', '[3]', '[{"road": 3, "file": "x"}]', '[{"0": 3}]'])
def test_broken_statistics_say_so(data, text):
    (data/'gta/sample_class_stats.json').write_text(text)
    with pytest.raises(ValueError, match='sample_class_stats.json.*delete it'): class_stats(gta(data))

@pytest.mark.parametrize('workers', [0,2])
def test_a_broken_label_is_named(data, workers):
    p = data/'gta/labels/00006.png'; p.write_bytes(p.read_bytes()[:60])
    with pytest.raises(ValueError, match='00006.png'): count_labels(gta(data), range(10), workers, quiet=True)

def test_town_statistics_equal_counting(shared_data):
    if not (shared_data/'town').is_dir(): pytest.skip('needs ../shared/data/town')
    kw = dict(root=shared_data, limit=8)
    shipped = json.loads((shared_data/'town/sample_class_stats.json').read_text())
    merged = SegFolder(DATASETS['town'], space=CAMVID11, merge=CAMVID_MERGE, **kw)
    keys = label_keys(merged)
    have,_ = loaders.read_stats(shared_data/'town/sample_class_stats.json', keys, ('.png','_labelTrainIds.png'))
    raw = native_ids(merged)
    assert len(shipped)==700 and [have[k] for k in keys]==[count_label(raw, i) for i in range(8)]
    assert class_stats(merged, quiet=True)==counted(merged)

# ---------------------------------------------------------------- rare-class sampling

@pytest.mark.parametrize('T', ['0.01','0.1','1.0','inf'])
def test_probabilities_equal_published(T):
    rows = json.loads((GOLDEN/'rcs_stats/sample_class_stats.json').read_text())
    stats = [(r['file'], {int(c):n for c,n in r.items() if c!='file'}) for r in rows]
    want = json.loads((GOLDEN/'units.json').read_text())['rcs'][T]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        rcs = RareClassSampler(stats, 19, float(T))
    np.testing.assert_allclose(rcs.prob[want['classes']], want['probs'], rtol=2e-5, atol=1e-9)
    if T!='inf': assert np.argsort(rcs.freq, kind='stable').tolist()==want['classes']

def test_temperature():
    two = RareClassSampler([('a', {0:505_000, 1:495_000})], 2)
    assert np.isclose(two.prob[1]/two.prob[0], np.e)
    even = RareClassSampler([('a', {c:4000 for c in range(7)})], 7)
    np.testing.assert_allclose(even.prob, 1/7)

def test_draws_follow_probabilities_and_show_the_class():
    rng = np.random.default_rng(1)
    stats = [(str(i), {c:int(n) for c,n in enumerate(rng.integers(0, [40_000,9000,5000,3500]))}) for i in range(30)]
    rcs = RareClassSampler(stats, 4, T=.3)
    got = [rcs.draw(rng) for _ in range(5000)]
    assert all(stats[i][1][c]>3000 for i,c in got)
    np.testing.assert_allclose(np.bincount([c for _,c in got], minlength=4)/5000, rcs.prob, atol=.03)
    ok = [i for i,s in enumerate(stats) if s[1][1]>3000]
    share = np.bincount([i for i,c in got if c==1], minlength=30)[ok]; share = share/share.sum()
    assert abs(share-1/len(ok)).max()<.05

def test_absent_and_small_classes_warn_once():
    stats = [('a', {0:90_000, 2:50}), ('b', {0:90_000, 2:20})]
    with pytest.warns(UserWarning) as w: rcs = RareClassSampler(stats, 4, names=('road','wall','bike','train'))
    assert len(w)==1 and 'wall, train' in str(w[0].message) and 'bike' in str(w[0].message)
    assert rcs.prob[1]==rcs.prob[3]==0 and rcs.prob[2]>.6 and np.isclose(rcs.prob.sum(), 1)
    assert {rcs.draw(np.random.default_rng(i)) for i in range(50)}=={(0,2)}       # the rare class, in the image that has most of it

def test_no_class_at_all_is_an_error():
    with pytest.raises(ValueError, match='no labelled pixel'): RareClassSampler([('a',{})], 5)
    with pytest.raises(ValueError, match='no labelled pixel'): RareClassSampler([], 5)

def test_pixel_limits_scale_by_area():
    assert rcs_px((1052,1914), (704,1280))==(3000,1500)
    m,c = rcs_px((526,957), (352,640))
    assert (m,c)==(750,375) and rcs_px((1052,1914), (704,1280), ratio=2)==(3000,6000)

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
