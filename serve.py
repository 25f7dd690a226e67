"""Stage 8: the model behind an OpenAI-compatible API, and a chat page in the browser.

python serve.py                              # http://127.0.0.1:8000
python serve.py --model out/sft --host 0.0.0.0 --api_key SECRET
curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \
    -d '{"model": "sft", "messages": [{"role": "user", "content": "感冒了怎么办？"}]}'
"""

import socket
import threading
from dataclasses import dataclass
from pathlib import Path

from generation.config import InferenceConfig
from generation.engine import Engine
from serving.service import Service
from stage import DEMO_OUT, ROOT, UserError, need, require, run_stage


@dataclass
class Config(InferenceConfig):
    """把模型作为 OpenAI 兼容的服务，并提供网页聊天；采样设置是请求没有写明时的默认值。"""

    model: Path = ROOT / "out" / "sft"  # 检查点文件夹（取其中最新的），或原项目的 .pth
    name: str | None = None  # 请求里的模型名；默认用文件夹的名字
    host: str = "127.0.0.1"  # 监听的地址；0.0.0.0 让别的机器也能访问（请同时设 --api_key）
    port: int = 8000  # 端口；0 为任意一个空闲的
    api_key: tuple[str, ...] = ()  # 访问 /v1 所需的密钥，可以有几个；默认不需要
    api_key_file: Path | None = None  # 从文件读密钥，一行一个（命令行参数会被同机的人看到）
    cors: tuple[str, ...] = ()  # 允许哪些网站的网页调用，如 https://example.com；* 为所有
    slots: int = 16  # 最多同时生成几个回答
    max_waiting: int = 64  # 最多几个回答在排队；再多就答 429
    max_body: float = 1.0  # 请求体最多多少 MB
    timeout: float = 300.0  # 一个请求最多多少秒（包括排队）
    grace: float = 30.0  # 关闭时最多等正在生成的回答多少秒
    strict_context: bool = False  # 放不进上下文就答 400；默认去掉最早的几轮对话，并缩短回答
    access_log: bool = False  # 每个请求打印一行

    max_new_tokens: int = 512  # 请求没有写明时，最多生成多少 token
    temperature: float = 1.0  # 0 总取最可能的 token；越大越随机

    DEMO = dict(model=DEMO_OUT / "sft", max_new_tokens=80)

    def check(self) -> None:
        super().check()
        require(0 <= self.port < 65536, "port", self.port, "在 0 与 65535 之间")
        require(self.slots >= 1, "slots", self.slots, "至少为 1")
        require(self.max_waiting >= 0, "max_waiting", self.max_waiting, "不能小于 0")
        for name in ("max_body", "timeout"):
            require(0 < getattr(self, name) < 1e6, name, getattr(self, name), "必须大于 0")
        require(0 <= self.grace < 1e6, "grace", self.grace, "不能小于 0")
        require(all(self.api_key), "api_key", self.api_key, "不能为空")

    def keys(self) -> list[str]:
        """All keys, from the command line and the file."""
        keys = list(self.api_key)
        if self.api_key_file:
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise UserError(f"{self.api_key_file} 不是 UTF-8 文本；一行写一个密钥。") from error
            lines = [line.strip() for line in lines if line.strip()]
            if not lines:
                raise UserError(f"{self.api_key_file} 里没有密钥；一行写一个。")
            keys += lines
        return keys

    def model_name(self) -> str:
        """The name that requests call the model by: the run's folder, or the file, unless one was given."""
        path = self.model.resolve()
        if self.name or path.name.startswith("step_"):
            return self.name or path.parent.name
        return path.name if path.is_dir() else path.stem


def main(cfg: Config) -> None:
    try:
        import uvicorn

        from serving.api import create_app
    except ImportError as error:
        raise UserError(f"服务需要 {error.name}：pip install fastapi uvicorn") from error
    if cfg.demo:
        need(cfg.model, "sft.py", cfg)
    service = Service(cfg.model_name(), cfg.sampling(), cfg.timeout, cfg.strict_context)
    app = create_app(service, cfg.keys(), int(cfg.max_body * (1 << 20)), cfg.cors)
    listener = listen(cfg.host, cfg.port)
    settings = uvicorn.Config(
        app,
        log_level="info" if cfg.access_log else "warning",
        access_log=cfg.access_log,
        timeout_graceful_shutdown=5,
        ws="none",
        lifespan="off",
    )

    class Server(uvicorn.Server):
        """Stops in order: refuse new requests, let running ones finish, and only then close the connections."""

        failure: Exception | None = None

        def handle_exit(self, sig: int, frame: object) -> None:
            if service.is_closing:  # the second Ctrl-C
                self.should_exit = self.force_exit = True
                return
            print(
                f"正在关闭：最多等 {cfg.grace:g} 秒让正在生成的回答结束（再按一次 Ctrl-C 立即退出）",
                flush=True,
            )
            service.is_closing = True
            threading.Thread(target=self.drain, daemon=True).start()

        def drain(self) -> None:
            service.close(cfg.grace)
            self.should_exit = True

        def load(self) -> None:
            """Load the model while the server answers that it is loading."""
            try:
                loaded = cfg.load()
                engine = Engine(loaded.model, loaded.tokenizer, cfg.slots, cfg.max_waiting)
                service.open(loaded, engine)
                print(
                    f"已就绪：{address}（网页聊天），{address}/v1（API），模型名 {service.name}", flush=True
                )
            except Exception as error:
                self.failure = error
                self.should_exit = True

    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if cfg.host not in ("127.0.0.1", "localhost", "::1") and not cfg.keys():
        print("注意：别的机器也能访问，而没有设 --api_key。", flush=True)
    server = Server(settings)
    threading.Thread(target=server.load, daemon=True).start()
    server.run(sockets=[listener])
    if server.failure:
        raise server.failure
    print("已关闭。", flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. UserError where there can be none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"无法监听 {host}:{port}（{reason}）；请用 --port 换一个端口，或检查 --host。"
        ) from error


if __name__ == "__main__":
    run_stage(Config, main)
