"""Uses the API with a token of an OpenID provider, oidc-provider-mock: `python provider.py API_URL PORT`.

The API accepts the issuer http://localhost:PORT. A person signs in there with the authorization code flow.
"""

import os
import subprocess
import sys
import time
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx

api, port = sys.argv[1:]
issuer = f"http://localhost:{port}"
command = [os.path.join(os.path.dirname(sys.executable), "oidc-provider-mock"), "--port", port, "--host", "localhost"]
provider = subprocess.Popen([*command, "--user", "ann"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def retry(what, attempt):
    """Returns the result of the attempt once it is true."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if result := attempt():
                return result
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError(what)


try:
    found = retry("the provider answers", lambda: httpx.get(f"{issuer}/.well-known/openid-configuration")).json()
    redirect = "http://localhost/signed-in"
    query = urlencode(
        {"client_id": "postrider", "redirect_uri": redirect, "response_type": "code", "scope": "openid", "state": "s"}
    )
    signed_in = httpx.post(f"{found['authorization_endpoint']}?{query}", data={"sub": "ann"})
    code = parse_qs(urlsplit(signed_in.headers["location"]).query)["code"][0]
    form = {"grant_type": "authorization_code", "code": code, "redirect_uri": redirect}
    answer = httpx.post(found["token_endpoint"], data=form, auth=("postrider", "secret")).raise_for_status().json()
    headers = {"authorization": f"Bearer {answer['id_token']}"}
    retry("the token is accepted", lambda: httpx.get(f"{api}/", headers=headers).status_code == 200)
    lacking = httpx.get(f"{api}/pull/a", headers=headers)
    assert (lacking.status_code, lacking.json()["scope"]) == (403, "kv:read"), lacking.text
    assert httpx.get(f"{api}/").status_code == 401
finally:
    provider.terminate()
    provider.wait()
print("a token of the provider is accepted")
