"Recipes: names, old spellings, files and folders of earlier versions, settings without effect"

import json
import warnings

import pytest
import torch
import yaml
from conftest import ROOT

from udanb.core.storage import read_json, write_json
from udanb.demo.render import write_demo
from udanb.methods.registry import (
    EXTENSIONS,
    METHODS,
    SUPERVISED_METHODS,
    method_arguments,
    unused_fields,
)
from udanb.runs.build import build_trainer
from udanb.runs.presets import RECIPES, changed_fields, make_recipe, validate_recipe
from udanb.runs.provenance import input_hashes, upgrade_input_names
from udanb.runs.recipe import (
    MOVED_FIELDS,
    RENAMED_FIELDS,
    Recipe,
    cast_field,
    flat_fields,
    from_json,
    parse_overrides,
    recipe_dict,
    replace_flat,
    upgrade_recipe_dict,
)
from udanb.runs.results import legacy_recipe_dict, run_name
from udanb.runs.run import source_only_recipe, train_run

GOLDEN = ROOT / 'tests' / 'golden'
OLD_RECIPE = read_json(GOLDEN / 'recipe_v0.json')  # of a real run of `make demo`, commit 1b0aad7
OLD_NAMES = read_json(GOLDEN / 'run_names.json')  # run names that commit 1b0aad7 gave
TINY = dict(
    backbone='mit_b0',
    pretrained=None,
    embed_dim=16,
    batch_size=2,
    crop_size=(64, 64),
    rcs_min_pixels=8,
    steps=2,
    save_every=1,
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write_demo(root / 'demo', n_source=4, n_target=4, n_val=2, size=(64, 128))
    return root


# ---- earlier versions


def recipe_of_row(row):
    "The recipe that a row of the golden names asks for, with the names it was asked for then"
    if 'params' not in row:
        more = {k: v for k, v in row['kw'].items() if k != 'over'}
        return make_recipe(*row['args'], overrides=row['kw'].get('over', {}), **more)
    given = yaml.safe_load((ROOT / 'params' / f'{row["params"]}.yaml').read_text())
    parameters = {k: given.get(k) for k in ('backbone', 'steps', 'seed', 'datasets')}
    overrides = given.get('overrides', {})
    name = given.get('recipe', 'daformer')
    return make_recipe(name, given['source'], given.get('target'), overrides, **parameters)


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_runs_keep_their_names():
    "Folders of earlier runs are found again: all presets on three pairs, changed ones, and all of params/"
    for row in OLD_NAMES:
        recipe = recipe_of_row(row)
        baseline = source_only_recipe(recipe)
        assert run_name(recipe) == row['name'], row
        assert (run_name(baseline) if baseline else None) == row.get('baseline'), row


def test_old_recipe_json_is_the_same_run():
    recipe = make_recipe('daformer', 'demo')
    assert upgrade_recipe_dict(OLD_RECIPE) == recipe_dict(recipe)
    assert recipe_dict(from_json(OLD_RECIPE)) == recipe_dict(recipe)
    assert legacy_recipe_dict(recipe) == OLD_RECIPE


@pytest.mark.parametrize('name', RECIPES)
def test_old_and_new_files_of_every_preset_agree(name):
    recipe = make_recipe(name, 'town')
    for stored in (recipe_dict(recipe), legacy_recipe_dict(recipe)):
        assert upgrade_recipe_dict(stored) == recipe_dict(recipe)
        assert from_json(json.loads(json.dumps(stored))).data == recipe.data


@pytest.mark.parametrize('name', ['daformer', 'dacs', 'source_only'])
def test_old_checkpoint_resumes(name, data, tmp_path):
    "A checkpoint and a recipe.json with the earlier names go on; one of another recipe is refused"
    recipe = make_recipe(name, 'demo', overrides=TINY)
    trainer = build_trainer(recipe, data, tmp_path, quiet=True)
    trainer.fit()
    state = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    old = legacy_recipe_dict(recipe)
    assert 'batch' in old and 'batch_size' not in old
    torch.save(state | dict(recipe=json.dumps(old)), tmp_path / 'checkpoint.pt')
    write_json(tmp_path / 'recipe.json', old)
    again = build_trainer(recipe, data, tmp_path, quiet=True)
    assert again.resume() and again.it == 2
    assert train_run(recipe, data, tmp_path, quiet=True) == tmp_path
    other = replace_flat(recipe, weight_decay=0.5)
    with pytest.raises(ValueError, match='weight_decay: 0.01 there, 0.5 here'):
        build_trainer(other, data, tmp_path, quiet=True).resume()
    with pytest.raises(ValueError, match='recipe.json belongs to another recipe'):
        train_run(other, data, tmp_path, quiet=True)


def test_old_input_hashes_compare(tmp_path):
    folder = tmp_path / 'labels'
    folder.mkdir()
    (folder / 'pseudo.jsonl').write_text('{}')
    (tmp_path / 'w.bin').write_bytes(b'w')
    start = dict(init_weights=str(tmp_path / 'w.bin'))
    for given, name in ((str(folder), 'pseudo'), ([str(folder)], 'pseudo.0')):
        stored = dict(method_args=dict(selftrain=dict(pseudo_labels=given)))
        hashes = input_hashes(replace_flat(Recipe('selftrain'), start | stored))
        assert len(hashes) == 2
        old = {'init': hashes['init_weights'], name: [*hashes.values()][1]}
        assert upgrade_input_names(old) == hashes == upgrade_input_names(hashes)


# ---- spelling

EXAMPLES = dict(lr=(1e-3, 'optim'), batch_size=(3, 'data'), embed_dim=(8, 'model'))


@pytest.mark.parametrize('name', EXAMPLES)
def test_three_spellings(name):
    value, section = EXAMPLES[name]
    ways = {name: value}, {f'{section}.{name}': value}, {section: {name: value}}
    recipes = [make_recipe('dacs', overrides=way) for way in ways]
    assert recipes[0] == recipes[1] == recipes[2]
    assert getattr(getattr(recipes[0], section), name) == value


@pytest.mark.parametrize('old,new', RENAMED_FIELDS.items())
def test_old_names_are_accepted_with_one_warning(old, new):
    with pytest.warns(FutureWarning, match=f"'{old}' is now called '{new}'") as caught:
        assert parse_overrides({old: 1}) == {new: 1}
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match=f'{old} and {new} set the same field'):
            parse_overrides({old: 1, new: 1})


def test_moved_fields():
    with pytest.warns(FutureWarning, match='method_args: {daformer: {fd'):
        recipe = make_recipe(overrides=dict(fd='1e-3', args=dict(daformer=dict(tau=0.9))))
    assert recipe.method_args == dict(daformer=dict(tau=0.9, fd=1e-3))
    with pytest.warns(FutureWarning):
        recipe = make_recipe('selftrain', overrides=dict(pseudo=['a/b']))
    assert recipe.method_args == dict(selftrain=dict(pseudo_labels=['a/b']))
    for name, value in dict(fd=0.1, pseudo='labels').items():
        owner = MOVED_FIELDS[name][0]
        with pytest.warns(FutureWarning), pytest.raises(ValueError, match=f'does not use {owner}'):
            make_recipe('dacs', overrides={name: value})


def test_unknown_names_are_refused():
    for overrides, match in (
        ({'optim.lrr': 1}, "field of the section 'optim' 'lrr'; did you mean 'lr'"),
        ({'optm.lr': 1}, "section of a recipe 'optm'; did you mean 'optim'"),
        ({'optim': 1}, 'optim=1: give a dict'),
        ({'batchsize': 1}, "did you mean 'batch_size'"),
        ({'execution': {'workers_': 1}}, "section 'execution'"),
    ):
        with pytest.raises(ValueError, match=match):
            make_recipe(overrides=overrides)


@pytest.mark.parametrize(
    'name,value',
    [
        ('steps', 2.5),
        ('steps', True),
        ('rcs', 'yes'),
        ('rcs', 1),
        ('crop_size', 'big'),
        ('crop_size', [64, 'x']),
        ('lr', None),
        ('lr', 'fast'),
        ('method_args', []),
        ('backbone', 5),
    ],
)
def test_wrong_types_are_refused(name, value):
    with pytest.raises(ValueError, match=f'{name}=.*this should be'):
        cast_field(name, value)


def test_types_are_converted():
    assert cast_field('lr', '1e-4') == 1e-4 and isinstance(cast_field('lr', 1), float)
    assert cast_field('source_weights', [1, '2']) == (1.0, 2.0)
    assert cast_field('embed_dim', None) is None and cast_field('steps', '3') == 3
    assert cast_field('target', 'a') == 'a' and cast_field('target', ['a']) == ('a',)


# ---- settings without effect

CHANGED = dict(
    ema_decay=0.9,
    confidence_threshold=0.9,
    teacher_bn='student',
    target_margins='none',
    jitter_prob=0.1,
    blur_prob=0.1,
)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('field', CHANGED)
def test_fields_without_effect_are_refused(method, field):
    recipe = replace_flat(RECIPES[method], {field: CHANGED[field]})
    no_effect = f'{field}=.* has no effect on the method {method}'
    if field == 'target_margins' and method in SUPERVISED_METHODS:  # stored by earlier chains
        with pytest.raises(ValueError, match=no_effect):
            validate_recipe(recipe)
    elif field in unused_fields(method):
        with pytest.raises(ValueError, match=no_effect):
            validate_recipe(recipe)
        assert recipe_dict(recipe) == recipe_dict(RECIPES[method])  # the same run
    else:
        assert validate_recipe(recipe) == recipe
        differs = flat_fields(RECIPES[method])[field] != CHANGED[field]
        assert (recipe_dict(recipe) != recipe_dict(RECIPES[method])) == differs


def test_presets_and_baselines_have_no_field_without_effect():
    for name in RECIPES:
        for source in ('gta', 'town', 'demo'):
            recipe = make_recipe(name, source, overrides=dict(run_baseline=True))
            baseline = source_only_recipe(recipe)
            assert validate_recipe(recipe) and (baseline is None or validate_recipe(baseline))


def test_every_method_has_its_settings():
    "All settings of a method pass through its function to a constructor: unknown ones are refused"
    for name in METHODS | EXTENSIONS:
        assert all(setting.isidentifier() for setting in method_arguments(name))
    with pytest.raises(ValueError, match="unknown setting of daformer 'net'"):
        make_recipe(overrides=dict(method_args=dict(daformer=dict(net=1))))
    with pytest.raises(ValueError, match='give a dict of settings'):
        make_recipe(overrides=dict(method_args=dict(daformer=1)))


def test_changed_fields_are_a_table():
    table = changed_fields(make_recipe('dacs', overrides=dict(lr=1e-3)), make_recipe('dacs'))
    assert list(table.index) == ['lr'] and table.preset['lr'] == '6e-05'
    assert changed_fields(Recipe()).empty
