package main

// examples are lines to type, for the help and the manual page.
var examples = map[string]string{
	"factory init": `factory init --token 'pkcs11:token=factory?module-path=/usr/lib/softhsm/libsofthsm2.so&` +
		`pin-source=file:/etc/kmehsm/factory.pin'
factory init --config /etc/kmehsm/factory.yaml`,
	"factory tokens": `factory tokens /usr/lib/softhsm/libsofthsm2.so
factory tokens --json`,
	"factory check":  `factory check --config factory.yaml`,
	"factory audit":  `factory audit --directory file:/srv/directory`,
	"factory doctor": `factory doctor --json`,
	"factory fixture enroll": `factory fixture enroll f1 --fixture-key fixture.pem --so-pin-source file:/run/so.pin ` +
		`--out fixture.json`,
	"factory operator enroll": `factory operator enroll op --transport-key transport.json --so-share a1 \
    --so-share a2 --thumbprint 7a0Zr6G0l1sWmJ3qv4u5yXcB2nD8eF9gH1iJ2kL3mN4 --out enrolment.jws`,
	"factory operator policy": `factory operator policy op --directory vault:kme |
    vault policy write kme-operator-op -`,
	"factory rotate signing-key": `factory rotate signing-key --generation 2`,
	"factory so split": `factory so split --shares 5 --threshold 3 --so-pin-source file:/run/so.pin --out shares \
    --custodian age1... --custodian age1... --custodian age1... --custodian age1... --custodian age1...`,
	"factory so check":       `factory so check --so-share a1 --so-share a2 --so-share a3`,
	"factory so show":        `factory so show`,
	"factory minutes verify": `factory minutes verify var/factory/minutes/20261126T101500Z.jws`,
	"factory station serve": `factory station serve --listen 0.0.0.0:8444 --tls-certificate server.pem --tls-key ` +
		`server.key \
    --client-ca stations.pem --station station-1 --station station-2 --directory file:/srv/directory`,
	"factory station report": `factory station report L1 > L1.csv`,
	"factory reconcile": `factory reconcile L1
factory reconcile L1 --repair`,
	"factory log verify":  `factory log verify`,
	"factory vault setup": `factory vault setup --directory vault:kme --dry-run`,
	"factory lot create": `factory lot create L1 --tac 35209900 --first 0 --count 20000
factory lot create L2 --tac 35209900 --first 20000 --count 1000 --bits 4096`,
	"factory lot provision": `factory lot provision L1
factory lot provision L1 --shards 0-499 --workers 8`,
	"factory lot list":    `factory lot list --json`,
	"factory lot show":    `factory lot show L1`,
	"factory lot status":  `factory lot status L1`,
	"factory lot grant":   `factory lot grant L1 --operator op --out L1.jws`,
	"factory lot verify":  `factory lot verify L1 --directory file:/srv/directory`,
	"factory lot seal":    `factory lot seal L1`,
	"factory lot reissue": `factory lot reissue L1 35209900000005 --reason 'return 4711'`,
	"factory lot refresh": `factory lot refresh
factory lot refresh L1 --valid-for 720h`,
	"factory lot revoke": `factory lot revoke L1 35209900000005 --reason stolen
factory lot revoke L1 --imeis shipment.txt --reason 'stolen from a warehouse'`,
	"factory help": `factory help lot create`,
	"factory completion": `factory completion bash > ~/.local/share/bash-completion/completions/factory
. <(factory completion bash)`,
	"factory man": `factory man | man -l -`,
}
