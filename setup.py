"Package metadata comes from settings.ini, so that nbdev and pip read one file."

from configparser import ConfigParser

from setuptools import find_packages, setup

ini = ConfigParser()
ini.read('settings.ini')
cfg = ini['DEFAULT']
setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    license='Apache-2.0',
    author=cfg['author'],
    url=cfg['git_url'],
    python_requires=f'>={cfg["min_python"]}',
    packages=find_packages(include=['udanb', 'udanb.*']),
    install_requires=cfg['requirements'].split(),
    extras_require=dict(
        dev=cfg['dev_requirements'].split(),
        offline=cfg['offline_requirements'].split(),
    ),
    entry_points=dict(nbdev=['udanb=udanb._modidx:d']),
)
