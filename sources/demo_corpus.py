"""The built-in demo corpus, generated when a stage first needs it."""

from stage import DEMO_DIR, UserError


def ensure_demo() -> None:
    """Generate the demo's raw, instruction, preference and evaluation files unless they are there."""
    if not (DEMO_DIR / "raw").exists():
        from demo.make import make_demo

        print(f"生成内置演示语料到 {DEMO_DIR} …", flush=True)
        try:
            make_demo(DEMO_DIR)
        except FileExistsError as error:
            raise UserError(f"{DEMO_DIR} 里有别的文件，不敢覆盖；请移走或删除该文件夹后重跑。") from error
