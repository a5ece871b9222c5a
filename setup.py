"Package metadata comes from settings.ini, so that nbdev and pip read one file."
from configparser import ConfigParser
from setuptools import setup, find_packages

ini = ConfigParser(); ini.read('settings.ini'); cfg = ini['DEFAULT']
split = lambda k: cfg[k].split()
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0',
    author=cfg['author'], url=cfg['git_url'], python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['udanb', 'udanb.*']), install_requires=split('requirements'),
    extras_require=dict(dev=split('dev_requirements'), offline=split('offline_requirements')),
    entry_points=dict(nbdev=['udanb=udanb._modidx:d']))
