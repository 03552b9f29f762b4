# Makes the certificates of a control plane in $1, and kubeconfigs for the server at 127.0.0.1:$2.
set -eu
cd "$1"
# Private keys are nobody else's.
umask 077
openssl ecparam -name prime256v1 -genkey -noout -out ca.key
openssl req -x509 -new -key ca.key -subj /CN=test-ca -days 3650 -out ca.crt \
    -addext keyUsage=critical,keyCertSign,digitalSignature -addext basicConstraints=critical,CA:TRUE
# name, subject, alternative names, use
certificate() {
    openssl ecparam -name prime256v1 -genkey -noout -out "$1.key"
    openssl req -new -key "$1.key" -subj "$2" -out "$1.csr"
    printf 'extendedKeyUsage=%s\n%s' "$4" "${3:+subjectAltName=$3}" >"$1.ext"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial ${5:-"-days" "3650"} \
        -extfile "$1.ext" -out "$1.crt"
}
certificate apiserver /CN=kube-apiserver \
    DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1 serverAuth
certificate admin /O=system:masters/CN=admin "" clientAuth
certificate stranger /CN=stranger "" clientAuth
certificate controller-manager /CN=system:kube-controller-manager "" clientAuth
certificate scheduler /CN=system:kube-scheduler "" clientAuth
# One that has expired: the authority signs it for a past day.
openssl ecparam -name prime256v1 -genkey -noout -out expired.key
openssl req -new -key expired.key -subj /O=system:masters/CN=late -out expired.csr
touch index && echo 01 >serial
printf '[ca]\ndefault_ca=c\n[c]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n[p]\norganizationName=optional\ncommonName=supplied\n[e]\nextendedKeyUsage=clientAuth\n' >ca.conf
openssl ca -batch -config ca.conf -extensions e -keyfile ca.key -cert ca.crt -in expired.csr -out expired.crt -notext \
    -startdate 20200101000000Z -enddate 20200102000000Z
openssl genrsa -out service-account.key 2048
openssl rsa -in service-account.key -pubout -out service-account.pub
for user in admin stranger expired controller-manager scheduler; do
    cat >"$user.kubeconfig" <<KUBECONFIG
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://127.0.0.1:$2", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: $user, user: {client-certificate-data: $(base64 -w0 "$user.crt"), client-key-data: $(base64 -w0 "$user.key")}}]
contexts: [{name: test, context: {cluster: test, user: $user}}]
current-context: test
KUBECONFIG
done
