"Geometry against naive code, strong augmentation against the numbers of the published code"
import colorsys, json
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from udanb.core import IGNORE, MEAN, denormalize, normalize
from udanb.transforms import (EvalTfm, LabelCrop, Strong, TrainTfm, blur, fit, fit_size, hue, jitter, kernel_size, saturation,
                              to_sample, varied, void_mask)

GOLDEN = Path(__file__).parent/'golden'
UNITS = json.loads((GOLDEN/'units.json').read_text())
AUG = np.load(GOLDEN/'aug.npz')

def pair(h=60, w=90, seed=0, cell=10, n=5):
    "An image whose red channel is its label, so that any disagreement between the two shows"
    rng = np.random.default_rng(seed)
    lbl = rng.integers(0, n, (h//cell+1,w//cell+1)).repeat(cell,0).repeat(cell,1)[:h,:w].astype(np.uint8)
    return np.stack([lbl*10, rng.integers(0,255,(h,w)), np.arange(h*w).reshape(h,w)%251], -1).astype(np.uint8),lbl

# ---------------------------------------------------------------- published numbers

@pytest.mark.parametrize('i', range(len(UNITS['jitter']['cases'])))
def test_jitter_equals_kornia(i):
    c = UNITS['jitter']['cases'][i]
    x = torch.from_numpy(np.random.RandomState(13).random_sample((1,3,8,8)).astype(np.float32))
    y = jitter(x, *(c[k] for k in ('brightness','contrast','saturation','hue')), c['order'])[0]
    torch.testing.assert_close(y, torch.from_numpy(AUG[f'jit{i}']), atol=5e-6, rtol=0)
    got = [y.double().sum(), y.double().mean(), y.double().abs().mean(), y.double().std(unbiased=False), y.min(), y.max()]
    np.testing.assert_allclose([float(v) for v in got], c['stats'], rtol=1e-5, atol=5e-6)

@pytest.mark.parametrize('c', UNITS['blur'], ids=lambda c: f"{c['n']}-{c['sigma']}")
def test_blur_equals_published(c):
    n = c['n']
    x = torch.from_numpy(np.random.RandomState(14).standard_normal((1,3,n,n)).astype(np.float32))
    assert kernel_size(n)==c['kernel']
    y = blur(x, c['sigma'])
    torch.testing.assert_close(y[0,:,:6,:6], torch.from_numpy(AUG[f"blur_{n}_{c['sigma']}_6x6"]), atol=2e-6, rtol=0)
    got = [y.double().sum(), y.double().mean(), y.double().abs().mean(), y.double().std(unbiased=False), y.min(), y.max()]
    np.testing.assert_allclose([float(v) for v in got], c['stats'], rtol=2e-5, atol=1e-4)

def test_kernel_rule(): assert [kernel_size(n) for n in (512,1024,64,192,256,100,20,5)]==[51,103,7,19,25,9,1,1]

@pytest.mark.parametrize('sigma', [.15,.6,1.15])
def test_short_kernel_equals_the_whole_square_one(sigma):
    x,k = torch.rand(1,3,100,160)*4-2,51
    t = torch.arange(k, dtype=torch.float64)-k//2
    g = torch.exp(-t**2/(2*sigma**2)); g = torch.outer(g,g)/g.sum()**2
    ref = F.conv2d(F.pad(x.double(), [k//2]*4, mode='reflect'), g.expand(3,1,k,k), groups=3)
    torch.testing.assert_close(blur(x, sigma, k).double(), ref, atol=1e-6, rtol=0)

def test_blur_per_image_and_per_axis():
    x = torch.rand(3,3,40,64)
    y = blur(x, torch.tensor([.2,.7,1.1], dtype=torch.float64))
    for i,s in enumerate((.2,.7,1.1)): assert y[i].equal(blur(x[i:i+1], s)[0])
    bar = torch.zeros(1,3,40,64); bar[:,:,20] = 1
    assert blur(bar, 1., (1,9)).equal(bar*blur(torch.ones_like(bar), 1., (1,9))) and not blur(bar, 1., (9,1)).equal(bar)

# ---------------------------------------------------------------- colour

@pytest.mark.parametrize('f', [-.5,-.2,-.03,0.,.07,.2,.5])
def test_hue_equals_colorsys(f):
    x = torch.rand(3,6,7)
    x[:,0] = x[:1,0]; x[:,1] = 0; x[:,2] = 1; x[1,3] = x[0,3]                 # grey, black, white, ties
    ref = [[colorsys.hsv_to_rgb((h+f)%1, s, v) for h,s,v in (colorsys.rgb_to_hsv(*p) for p in row)] for row in x.movedim(0,-1).tolist()]
    torch.testing.assert_close(hue(x, f), torch.tensor(ref).movedim(-1,0), atol=3e-6, rtol=0)

@pytest.mark.parametrize('f', [0.,.8,1.,1.2,9.])
def test_saturation_equals_colorsys(f):
    x = torch.rand(3,6,7)
    x[:,0] = x[:1,0]; x[:,1] = 0
    ref = [[colorsys.hsv_to_rgb(h, min(1,s*f), v) for h,s,v in (colorsys.rgb_to_hsv(*p) for p in row)] for row in x.movedim(0,-1).tolist()]
    torch.testing.assert_close(saturation(x, f), torch.tensor(ref).movedim(-1,0), atol=3e-6, rtol=0)

def test_jitter_is_per_image():
    x,o = torch.rand(3,3,8,8),[[0,1,2,3],[3,2,1,0],[2,0,3,1]]
    fs = [[1.1,.9,1.],[.9,1.,1.1],[1.2,.8,1.],[.1,0.,-.2]]
    y = jitter(x, *map(torch.tensor, fs), torch.tensor(o))
    for i in range(3): assert y[i].equal(jitter(x[i:i+1], *(f[i] for f in torch.tensor(fs).double().tolist()), o[i])[0])
    assert y.min()>-1e-6 and y.max()<1+1e-6

def test_strong_coins_and_ranges():
    x,jit,blr = normalize(torch.rand(1,3,30,30)),0,0
    for s in range(400):
        torch.manual_seed(s); jit += not Strong(p_blur=0)(x).equal(x)
        torch.manual_seed(s); blr += not Strong(p_jitter=0)(x).equal(x)
    assert abs(jit/400-.8)<.07 and abs(blr/400-.5)<.09

def test_strong_repeats_by_seed_leaves_input_alone_and_shares_coins():
    x = normalize(torch.rand(4,3,20,30)); keep = x.clone()
    for s in range(20):
        torch.manual_seed(s); a = Strong()(x); after = torch.rand(1)
        torch.manual_seed(s); b = Strong()(x)
        assert a.equal(b) and x.equal(keep) and torch.rand(1).equal(after)
        changed = [not a[i].equal(x[i]) for i in range(4)]
        assert all(changed) or not any(changed)
    inside = denormalize(Strong(1, .2, 0)(x))
    assert inside.min()>-1e-5 and inside.max()<1+1e-5

def test_strong_needs_no_grad_and_no_device_reads():
    x = normalize(torch.rand(2,3,16,16)).requires_grad_()
    assert not Strong(1, p_blur=1)(x).requires_grad
    meta = torch.empty(2,3,32,32, device='meta')                              # reading any value back would raise here
    assert Strong(1, p_blur=1)(meta).shape==meta.shape

# ---------------------------------------------------------------- geometry

def test_fit_sizes_of_the_papers():
    table = {((1052,1914),(720,1280)):(704,1280), ((1052,1914),(1440,2560)):(1407,2560), ((760,1280),(760,1280)):(760,1280), ((1024,2048),(512,1024)):(512,1024),
             ((1080,1920),(540,960)):(540,960), ((1080,1920),(720,1280)):(720,1280), ((1914,1052),(720,1280)):(1280,704)}
    for (hw,size),want in table.items(): assert fit_size(hw, size)==want

def test_labels_are_never_interpolated():
    img,lbl = pair(60,90,n=3); lbl = lbl*100
    assert set(np.unique(fit(lbl, (37,55), nearest=True)))<=set(np.unique(lbl))
    assert fit(img, None) is img and EvalTfm((30,45))(img).shape==(30,45,3)

@pytest.mark.parametrize('crop', [(20,30),(60,90),(1,1)])
def test_image_and_label_move_together(crop):
    img,lbl = pair()
    tfm = TrainTfm(None, crop, flip=.5)
    for s in range(30):
        a,l,v = tfm(img, lbl, np.random.default_rng(s))
        assert a.shape==(*crop,3) and l.shape==v.shape==crop and v.all() and (a[...,0]==l*10).all()

def test_every_crop_is_a_window_of_the_image_and_all_places_occur():
    img,lbl = pair(12,13); img[...,2] = np.arange(12*13).reshape(12,13)
    tfm,seen,flips = TrainTfm(None, (10,10)),set(),[]
    for s in range(600):
        a = tfm(img, lbl, np.random.default_rng(s))[0][...,2].astype(int)
        flip = a[0,0]>a[0,-1]
        y,x = divmod(int(a[0,-1] if flip else a[0,0]), 13)
        win = img[y:y+10,x:x+10,2]
        assert (a==(win[:,::-1] if flip else win)).all()
        seen.add((y,x)); flips.append((flip,y,x))
    assert len(seen)==12                                                       # 3x4 places, the last ones included
    f = np.array(flips, float)
    assert abs(f[:,0].mean()-.5)<.08 and abs(np.corrcoef(f.T)[0,1:]).max()<.12 # the flip knows nothing of the place

def test_padding_is_mean_colour_ignored_and_invalid():
    img,lbl = pair(20,30)
    a,l,v = TrainTfm(None, (32,48), cat_max=.75)(img, lbl, np.random.default_rng(1))
    pad = v==0
    assert pad[20:].all() and not pad[:20].all() and (l[pad]==IGNORE).all() and (a[pad]==np.round(255*np.array(MEAN))).all()
    assert (~pad).sum()==600 and (l[~pad]!=IGNORE).all() and abs(to_sample(a).img[0][:,torch.from_numpy(pad)]).max()<.01

def test_margins_follow_the_geometry():
    img,lbl = pair(64,128)
    marked = img.copy(); marked[...] = 200; marked[:4] = marked[-8:] = 0; marked[:,:6] = marked[:,-2:] = 0   # image shows the margins themselves
    tfm = TrainTfm((32,64), (24,24), margins=(4,8,6,2))
    for s in range(20):
        a,none,v = tfm(marked, None, np.random.default_rng(s))
        assert none is None and ((a[...,0]==200)==(v==1)).mean()>.999
    with pytest.raises(ValueError, match='leave nothing'): TrainTfm(None, (8,8), margins=(30,40,0,0))(img, None, np.random.default_rng(0))
    with pytest.raises(ValueError): void_mask((8,8), (-1,0,0,0))

def test_label_of_another_size_is_refused():
    img,lbl = pair()
    with pytest.raises(ValueError): TrainTfm(None, (16,16))(img, lbl[:-3], np.random.default_rng(0))

def test_varied_equals_naive():
    rng = np.random.default_rng(0)
    for _ in range(300):
        l = rng.choice([0,1,2,255], rng.integers(1,40), p=rng.dirichlet([.4]*4))
        ids,cnt = np.unique(l[l!=255], return_counts=True)
        assert varied(np.bincount(l, minlength=256), .75)==(len(cnt)>1 and cnt.max()/cnt.sum()<.75)

def naive(lbl, crop, seed, cat_max, want, min_px):
    "The two nested redraws, written out over the transform's own stream of boxes"
    cut = LabelCrop(*crop); cut.set_random_seed(seed)
    box = lambda: LabelCrop.__mro__[1].get_params_dependent_on_data(cut, dict(shape=lbl.shape), {})['crop_coords']
    for i in range(11):
        for j in range(11):
            x0,y0,x1,y1 = b = box()
            ids,cnt = np.unique(lbl[y0:y1,x0:x1], return_counts=True)
            cnt = {i:c for i,c in zip(ids,cnt)}; some = [c for i,c in cnt.items() if i!=IGNORE]
            if cat_max is None or (len(some)>1 and max(some)/sum(some)<cat_max): break
        if want is None or cnt.get(want,0)>min_px: return b,i,j
    return b,i,j

@pytest.mark.parametrize('cat_max,want,min_px', [(.4,None,0),(None,3,20),(.6,3,20),(.6,3,10_000),(.2,None,0)])
def test_redraws_equal_naive_nested_loops(cat_max, want, min_px):
    img,lbl = pair(seed=3); lbl[:20] = 0; lbl[50:] = IGNORE
    redraws = 0
    for s in range(25):
        cut = LabelCrop(24,24); cut.cat_max = cat_max; cut.set_random_seed(s)
        got = cut.get_params_dependent_on_data(dict(shape=lbl.shape), dict(mask=lbl, want=None if want is None else (want,min_px)))['crop_coords']
        box,i,j = naive(lbl, (24,24), s, cat_max, want, min_px)
        assert tuple(got)==tuple(box)
        redraws += i+j
    assert redraws

def test_wanted_class_is_found_and_impossible_wishes_end():
    lbl = np.zeros((100,200), np.uint8); lbl[40:48,90:100] = 7
    img = np.zeros((100,200,3), np.uint8)
    count = lambda **kw: np.mean([(TrainTfm(None, (50,50))(img, lbl, np.random.default_rng(s), **kw)[1]==7).sum()>40 for s in range(80)])
    assert count(want=7, min_px=40)>.9>.6>count()
    assert TrainTfm(None, (50,50), cat_max=.75)(img, lbl, np.random.default_rng(0), want=12, min_px=1)[1].shape==(50,50)

def test_same_generator_same_view_whatever_came_before():
    img,lbl = pair(); tfm = TrainTfm((50,75), (32,32), cat_max=.75)
    a = tfm(img, lbl, np.random.default_rng((1,2)))
    for _ in range(3): tfm(img, lbl, np.random.default_rng())
    np.random.seed(5); b = TrainTfm((50,75), (32,32), cat_max=.75)(img, lbl, np.random.default_rng((1,2)))
    for x,y in zip(a,b): np.testing.assert_array_equal(x,y)

def test_to_sample():
    img,lbl = pair(); lbl[0] = IGNORE
    s = to_sample(img[:,::-1], lbl[:,::-1], (lbl!=IGNORE)[:,::-1].astype(np.uint8), 'x.png')
    assert s.lbl.dtype==torch.int64 and s.wgt.dtype==torch.float32 and s.name==('x.png',) and s.img.dtype==torch.float32
    assert ((s.wgt==0)==(s.lbl==IGNORE)).all() and s.lbl[0,5].tolist()==lbl[5,::-1].tolist()
