#!/usr/bin/env bash
# Brings the jars of the Kafka broker that the tests start to .cache/kafka-libs, unless they are there. Needs mvn.
set -eu
cd "$(dirname "$0")/.."
pom=tests/kafka/broker/pom.xml
libs=.cache/kafka-libs
mkdir -p .cache
exec 9>.cache/kafka-libs.lock
flock 9  # two test runs may begin at once
cmp -s "$pom" "$libs/pom.xml" && exit 0
fresh=$(mktemp -d .cache/kafka-libs.XXXXXX)
trap 'rm -rf "$fresh"' EXIT
mvn -q -B -f "$pom" dependency:copy-dependencies -DoutputDirectory="$PWD/$fresh"
cp "$pom" "$fresh/pom.xml"
rm -rf "$libs"
mv "$fresh" "$libs"
