# Whoever looks after the directory: how its mount is described, and how many versions of an object are kept. No
# object of it; and no policy, AppRole or mount: whoever writes one of those may give it, and so itself, all of Vault.
path "sys/mounts/{{.Mount}}" {
  capabilities = ["read"]
}
path "sys/mounts/{{.Mount}}/tune" {
  capabilities = ["read", "update"]
  allowed_parameters = {
    "description" = []
  }
}
# Not delete_version_after, by which Vault would delete what is published.
path "{{.Mount}}/config" {
  capabilities = ["read", "update"]
  allowed_parameters = {
    "max_versions" = []
    "cas_required" = []
  }
}
